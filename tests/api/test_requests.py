"""Messages to the engine's types: each field arrives where it belongs, and nothing else does."""

import json
import math
from types import SimpleNamespace

import pytest
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from hypothesis import given
from hypothesis import strategies as st

from sparse_kernels.choice import ChoiceKind, Score
from sparserve.api import requests
from sparserve.client import make_chat_request, make_request
from sparserve.engine.constraint import Constraint, ConstraintKind
from sparserve.engine.policies import Policies, PolicyRules
from sparserve.engine.request import OutputParams, SamplingParams, StoppingParams
from sparserve.engine.tokenizer import TextTokenizer
from sparserve.errors import InvalidRequest, NotBuiltYet
from sparserve.sparsity.chooser import Chooser
from sparserve.sparsity.policy import DENSE, DraftKind, Policy, PolicyKind, PredictorKind
from sparserve.v1 import inference_pb2 as pb

MESSAGES = [{"role": "user", "content": "hi"}]
# Every keyword of a request with a value other than its default, and the engine's value.
SAMPLING = {
    "temperature": 0.5, "top_k": 7, "top_p": 0.25, "min_p": 0.125, "typical_p": 0.75,
    "repetition_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 0.25, "seed": 9, "n": 3,
}  # fmt: skip
STOPPING = {"max_tokens": 5, "min_tokens": 2, "ignore_eos": True, "include_stop": True}
OUTPUT = {"top_logprobs": 4, "prompt_logprobs": 0, "skip_special_tokens": False}


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    names = {"bos_token": 256, "eos_token": 257}
    return TextTokenizer(tiny_model.tokenizer, tiny_model.chat_template, 259, names)


def policies(**rules) -> Policies:
    """Of a model without an index; `rules` are the operator's."""
    shape = SimpleNamespace(num_layers=2, layer_neurons=(96, 96))
    reads = SimpleNamespace(choices=frozenset(), neuron_bytes={None: (1.0, 2.0, 0.0, 0.0)})
    return Policies(Chooser(shape, reads), PolicyRules(**rules))


@pytest.fixture
def parse(tokenizer):
    return lambda message, seconds_left=None: requests.parse_request(
        message, tokenizer, 511, policies(), seconds_left, 100.0
    )


@pytest.mark.parametrize("asked", [make_request("hello"), make_chat_request(MESSAGES)])
def test_a_request_that_says_nothing_gets_the_defaults_of_the_engine(parse, asked):
    request = parse(asked)
    assert request.sampling == SamplingParams()
    assert request.stopping == StoppingParams()
    assert request.output == OutputParams()
    assert request.constraint is None
    assert (request.priority, request.cache_salt, request.policy) == (0, "", DENSE)
    assert (request.deadline, request.arrival, request.report_statistics) == (None, 100.0, False)
    assert request.request_id != parse(asked).request_id


@pytest.mark.parametrize("make", [make_request, make_chat_request])
def test_every_field_arrives_in_the_engine(parse, make):
    message = make(
        "hello" if make is make_request else MESSAGES,
        **SAMPLING, **STOPPING, **OUTPUT,
        logit_bias={9: -1.0, 3: 2.5}, allowed_token_ids=[1, 2], stop=["a", "b"], stop_token_ids=[4],
        request_id="mine", priority=-7, cache_salt="salt", report_neurons=True, user="me",
        density=1.0, policy="dense",
    )  # fmt: skip
    request = parse(message, 2.0)
    bias = ((3, 2.5), (9, -1.0))
    assert request.sampling == SamplingParams(**SAMPLING, logit_bias=bias, allowed_token_ids=(1, 2))
    assert request.stopping == StoppingParams(**STOPPING, stop=("a", "b"), stop_token_ids=(4,))
    assert request.output == OutputParams(**OUTPUT)
    assert (request.request_id, request.priority, request.cache_salt) == ("mine", -7, "salt")
    assert (request.deadline, request.report_statistics) == (102.0, True)


def test_a_zero_is_a_value_and_not_an_absence(parse):
    request = parse(make_request("hello", temperature=0.0, skip_special_tokens=False, seed=0))
    assert (request.sampling.temperature, request.sampling.seed) == (0.0, 0)
    assert not request.output.skip_special_tokens
    assert request.output.prompt_logprobs is None
    for name in ("top_p", "typical_p", "repetition_penalty", "n"):
        with pytest.raises(InvalidRequest, match=f"sampling.{name} is 0"):
            parse(make_request("hello", **{name: 0}))


def test_a_chat_is_rendered_and_has_no_token_of_its_own(parse, tokenizer):
    text = "<user>hi\n<assistant>"
    assert parse(make_chat_request(MESSAGES)).prompt_token_ids == tokenizer.encode(text, 99)
    continued = [*MESSAGES, {"role": "assistant", "content": "well"}]
    request = parse(make_chat_request(continued, continue_final_message=True))
    assert request.prompt_token_ids == tokenizer.encode("<user>hi\n<assistant>well", 99)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"json_schema": '{"type": "object"}'}, (ConstraintKind.JSON_SCHEMA, '{"type": "object"}')),
        ({"json_schema": {"a": 1}}, (ConstraintKind.JSON_SCHEMA, '{"a": 1}')),
        ({"regex": "a+"}, (ConstraintKind.REGEX, "a+")),
        ({"grammar": 'root ::= "a"'}, (ConstraintKind.GRAMMAR, 'root ::= "a"')),
        ({"choice": ["ja", "nö"]}, (ConstraintKind.CHOICE, '["ja", "nö"]')),
        ({"json_object": True}, (ConstraintKind.JSON_OBJECT, "")),
    ],
)
def test_a_constraint_is_its_kind_and_source(fields, expected):
    for message in (make_request("x", **fields), make_chat_request(MESSAGES, **fields)):
        assert requests.constraint_of(message) == (expected and Constraint(*expected))


def test_only_one_constraint_can_be_asked_for():
    with pytest.raises(InvalidRequest, match="regex is a second constraint"):
        make_request("x", json_object=True, regex="a")


def test_messages_and_tools_have_the_shape_that_transformers_takes():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": [1, "ü"]}}}
    messages = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "hi", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]
    parameters = {"type": "object", "properties": {"a": {"type": "array"}}}
    function = {"name": "f", "description": "does", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    message = make_chat_request(
        messages, tools=tools, template_arguments={"flag": False, "n": 3, "x": [0.5, None, {"k": "v"}]}
    )  # fmt: skip
    conversation = requests.conversation_of(message)
    assert list(conversation.messages) == messages
    assert list(conversation.tools) == tools
    assert conversation.arguments == {"flag": False, "n": 3, "x": [0.5, None, {"k": "v"}]}
    assert type(conversation.arguments["n"]) is int
    assert not conversation.continue_final_message
    # Arguments as OpenAI's API writes them, and a tool without its wrapping, are the same message.
    written = {**call, "function": {"name": "f", "arguments": json.dumps({"a": [1, "ü"]})}}
    messages[2] = {"role": "assistant", "content": None, "tool_calls": [written]}
    same = make_chat_request(messages, tools=[function])
    assert requests.conversation_of(same).messages == conversation.messages
    assert requests.conversation_of(same).tools == conversation.tools


def test_a_call_and_a_tool_without_arguments_have_none():
    message = make_chat_request(
        [{"role": "assistant", "tool_calls": [{"name": "f"}]}], tools=[{"name": "f"}]
    )
    conversation = requests.conversation_of(message)
    (call,) = conversation.messages[0]["tool_calls"]
    assert call == {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert conversation.tools[0]["function"]["parameters"]["properties"] == {}


def deep(levels: int) -> str:
    return '{"a": ' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    ("change", "field", "told"),
    [
        (lambda m: m.ClearField("messages"), "messages", "0 messages given; 1 to 4096"),
        (lambda m: m.messages.extend([m.messages[0]] * 4096), "messages", "4097 messages"),
        (lambda m: m.tools.extend([pb.Tool(name="f")] * 257), "tools", "257 tools given"),
        (lambda m: m.messages.add(content="x"), "messages[1].role", "no role"),
        (lambda m: m.tools.add(), "tools[0].name", "no name"),
        (lambda m: m.tools.add(name="f", parameters="[1]"), "tools[0].parameters", "list"),
        (lambda m: m.tools.add(name="f", parameters="{"), "tools[0].parameters", "not JSON"),
        (lambda m: m.tools.add(name="f", parameters=deep(34)), "tools[0].parameters", "deeper"),
        (lambda m: m.tools.add(name="f", parameters=deep(99999)), "tools[0].parameters", ""),
        (lambda m: m.tools.add(name="f", parameters='{"a": NaN}'), "tools[0].parameters", "NaN"),
        (lambda m: m.tools.add(name="f", parameters='{"a": ' + "1" * 9999 + "}"),
         "tools[0].parameters", "not JSON"),
        (lambda m: m.messages[0].tool_calls.add(arguments="3"),
         "messages[0].tool_calls[0].arguments", "int"),
        (lambda m: m.template_arguments.update({"x": math.inf}), "template_arguments.x", "inf"),
    ],
)  # fmt: skip
def test_a_conversation_that_cannot_work_names_its_field(change, field, told):
    message = make_chat_request(MESSAGES)
    change(message)
    with pytest.raises(InvalidRequest) as refused:
        requests.conversation_of(message)
    assert refused.value.field == field
    assert told in str(refused.value)


def test_template_arguments_nest_32_levels_and_no_deeper():
    value = Value(number_value=1)
    for _ in range(32):
        value = Value(list_value=ListValue(values=[value]))
    message = make_chat_request(MESSAGES)
    message.template_arguments.CopyFrom(Struct(fields={"x": value}))
    assert json.dumps(requests.conversation_of(message).arguments["x"]).count("[") == 32
    message.template_arguments.fields["x"].CopyFrom(Value(list_value=ListValue(values=[value])))
    with pytest.raises(InvalidRequest, match="nested deeper than 32 levels"):
        requests.conversation_of(message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_template_arguments_arrive_as_they_were(arguments):
    message = make_chat_request(MESSAGES, template_arguments=arguments)
    assert requests.conversation_of(message).arguments == arguments


def test_what_is_not_served_is_named(parse):
    for fields, field in (({"adapter": "lora"}, "adapter"),):
        for message in (make_request("x", **fields), make_chat_request(MESSAGES, **fields)):
            with pytest.raises(NotBuiltYet) as refused:
                parse(message)
            assert refused.value.field == field


SPARSITY = {
    "density": 0.7, "core_density": 0.3, "alpha": 0.1, "first_layer": 0, "last_layer": 2,
    "refresh_interval": 16, "draft_tokens": 3,
}  # fmt: skip


@pytest.mark.parametrize("make", [make_request, make_chat_request])
def test_every_field_of_a_policy_arrives_as_it_was_written(parse, make):
    message = make(
        "hello" if make is make_request else MESSAGES,
        policy="exact", choose_by="gate", predictor="stability", score="signed_count", draft="token",
        **SPARSITY,
    )  # fmt: skip
    policy = parse(message).policy
    assert policy == Policy(
        PolicyKind.EXACT,
        choice=ChoiceKind.GATE,
        predictor=PredictorKind.STABILITY,
        score=Score.SIGNED_COUNT,
        draft=DraftKind.TOKEN,
        **SPARSITY,
    )
    target = parse(make_request("x", policy="auto", target_kl=0.05)).policy
    assert target == Policy(PolicyKind.AUTO, target_kl=0.05)


@pytest.mark.parametrize(
    ("rules", "asked", "expected"),
    [
        ({}, {}, Policy()),
        ({}, {"policy": "dense", "density": 1.0, "target_kl": 3.0}, Policy()),
        ({}, {"policy": "core"}, Policy(PolicyKind.CORE)),
        ({"default": PolicyKind.CORE, "default_density": 0.6}, {}, Policy(PolicyKind.CORE, 0.6)),
        ({"default": PolicyKind.CORE, "default_density": 0.6}, {"density": 0.9}, Policy(PolicyKind.CORE, 0.9)),
        ({"default": PolicyKind.CORE, "default_density": 0.6}, {"policy": "dense"}, Policy()),
        ({"default": PolicyKind.CORE}, {"prompt": "y"}, Policy()),
        ({"default": PolicyKind.CORE}, {"prompt": "y", "policy": "core"}, Policy(PolicyKind.CORE)),
        ({"default_density": 0.6}, {"policy": "core", "target_kl": 0.1}, Policy(PolicyKind.CORE, target_kl=0.1)),
        ({"default_density": 0.6}, {"policy": "exact"}, Policy(PolicyKind.EXACT)),
        ({"default_target_kl": 0.2, "default_density": 0.6}, {"policy": "auto"}, Policy(PolicyKind.AUTO, target_kl=0.2)),
        ({"default_target_kl": 0.2}, {"policy": "token"}, Policy(PolicyKind.TOKEN, target_kl=0.2)),
        ({"default_target_kl": 0.2}, {"policy": "core"}, Policy(PolicyKind.CORE)),
    ],
)  # fmt: skip
def test_what_a_request_leaves_out_is_the_operators_to_say(tokenizer, rules, asked, expected):
    asked = {"prompt": "yes", **asked}
    made = requests.parse_request(
        make_request(**asked), tokenizer, 511, policies(**rules), None, 0.0
    )
    assert made.policy == expected


def test_what_a_target_comes_to_keeps_to_the_operators_bounds():
    bounded = policies(min_density=0.8)
    assert policies().plan(Policy(PolicyKind.CORE)).density == 0.7
    assert bounded.plan(Policy(PolicyKind.CORE)).density == 0.8


def test_an_unknown_keyword_is_an_error_of_the_program():
    with pytest.raises(TypeError, match="no field 'temprature'"):
        make_request("x", temprature=1)


def test_every_field_of_a_request_has_a_keyword():
    """Set through its keyword, each field of the messages is there."""
    values = {
        **SAMPLING, **STOPPING, **OUTPUT, "logit_bias": {1: 1.0}, "allowed_token_ids": [1],
        "stop": ["a"], "stop_token_ids": [1], "text": False, "token_ids": True, "logprobs": True,
        "choose_by": "planes", "core_density": 0.5, "predictor": "auto", "score": "norm", "alpha": 0.5,
        "first_layer": 1, "last_layer": 2, "draft": "core", "draft_tokens": 1,
        "refresh_interval": 1, "report_neurons": True, "density": 1.0, "target_kl": 1.0,
        "policy": "auto", "regex": "a", "request_id": "i", "model": "m", "priority": 1,
        "cache_salt": "s", "adapter": "a", "user": "u",
    }  # fmt: skip
    message = make_chat_request(
        MESSAGES, tools=[{"name": "f"}], continue_final_message=True, template_arguments={"a": 1}, **values
    )  # fmt: skip
    for name in ("sampling", "stopping", "response", "sparsity", ""):
        part = getattr(message, name) if name else message
        missing = {f.name for f in part.DESCRIPTOR.fields} - {f.name for f, _ in part.ListFields()}
        assert not missing
