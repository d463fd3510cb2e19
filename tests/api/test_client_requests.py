"""What the client refuses before it sends anything: always InvalidRequest, with the field at fault."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparserve.client import InvalidRequest, make_chat_request, make_request
from sparserve.client.calls import call_options

HELLO = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("fields", "field", "told"),
    [
        ({"seed": -1}, "sampling.seed", "seed is -1; it must be in [0, 2^64)"),
        ({"seed": 2**64}, "sampling.seed", "it must be in [0, 2^64)"),
        ({"max_tokens": 1.5}, "stopping.max_tokens", "max_tokens is 1.5; it must be a whole number"),
        ({"max_tokens": 2**31}, "stopping.max_tokens", "is 2147483648; it must be in [-2^31, 2^31)"),
        ({"n": True}, "sampling.n", "n is True; it must be a whole number"),
        ({"temperature": "0.5"}, "sampling.temperature", "temperature is '0.5'; it must be a number"),
        ({"temperature": 10**400}, "sampling.temperature", "a number that a float can hold"),
        ({"text": 1}, "response.text", "text is 1; it must be True or False"),
        ({"user": 5}, "user", "user is 5; it must be a text"),
        ({"user": "a\ud800"}, "user", "half of a surrogate pair at position 1"),
        ({"stop": 5}, "stopping.stop", "stop is 5; it must be a list of texts"),
        ({"stop": ["a", 1]}, "stopping.stop[1]", "stop[1] is 1; it must be a text"),
        ({"choice": "yes"}, "constraint.choice", "choice is 'yes'; it must be a list of texts"),
        ({"allowed_token_ids": "12"}, "sampling.allowed_token_ids", "a list of token ids"),
        ({"stop_token_ids": "12"}, "stopping.stop_token_ids", "a list of token ids"),
        ({"stop_token_ids": 12}, "stopping.stop_token_ids", "a list of token ids"),
        ({"logit_bias": [1]}, "sampling.logit_bias", "a mapping of token ids to numbers"),
        ({"logit_bias": {"5": 1}}, "sampling.logit_bias", "a key of logit_bias is '5'"),
        ({"logit_bias": {5: "a"}}, "sampling.logit_bias[5]", "logit_bias[5] is 'a'"),
        ({"policy": "best"}, "sparsity.policy", "one of dense, core, token, exact, auto"),
        ({"report_neurons": "yes"}, "sparsity.report", "report_neurons is 'yes'"),
        ({"json_schema": 5}, "constraint.json_schema", "a mapping, or JSON as text"),
        ({"json_schema": {"a": {1}}}, "constraint.json_schema", "cannot be written as JSON"),
        ({"json_object": 1}, "constraint.json_object", "True or False"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_sent_is_named_with_what_is_allowed(fields, field, told):
    for make, what in ((make_request, "x"), (make_chat_request, HELLO)):
        with pytest.raises(InvalidRequest) as refused:
            make(what, **fields)
        assert refused.value.field == field
        assert told in str(refused.value)


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (None, "prompt"), (5, "prompt"), (b"ab", "prompt"), ({"a": 1}, "prompt"),
        ("\ud800", "text"), ([1, "a"], "token_ids[1]"), ([2**31], "token_ids[0]"),
    ],
)  # fmt: skip
def test_a_prompt_is_text_or_token_ids(prompt, field):
    with pytest.raises(InvalidRequest) as refused:
        make_request(prompt)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("messages", "field", "told"),
    [
        ("hi", "messages", "messages is 'hi'; it must be a list such as"),
        (None, "messages", "messages is None"),
        (HELLO[0], "messages", "it must be a list such as"),
        (["hi"], "messages[0]", "it must be a mapping such as"),
        ([*HELLO, {"content": "x"}], "messages[1].role", "messages[1] has no role"),
        ([{"role": 5}], "messages[0].role", "a text"),
        ([{"role": "user", "contents": "x"}], "messages[0].contents", "a key 'contents'; there are: role"),
        ([{"role": "user", "content": 5}], "messages[0].content", "a text, or a list of text parts"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
         "messages[0].content[0].type", "of type 'image_url'; only text is served"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]", "a mapping such as"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "None"),
        ([{"role": "user", "content": [{"type": "text", "text": "x", "mood": 1}]}],
         "messages[0].content[0].mood", "a key 'mood'"),
        ([{"role": "assistant", "tool_calls": "f"}], "messages[0].tool_calls", "a list of calls"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}],
         "messages[0].tool_calls[0].function.name", "has no name"),
        ([{"role": "assistant", "tool_calls": [{"type": "web", "function": {"name": "f"}}]}],
         "messages[0].tool_calls[0].type", "of type 'web'; only function is served"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": {1}}}]}],
         "messages[0].tool_calls[0].arguments", "cannot be written as JSON"),
    ],
)  # fmt: skip
def test_a_message_of_another_shape_is_refused_by_name(messages, field, told):
    with pytest.raises(InvalidRequest) as refused:
        make_chat_request(messages)
    assert refused.value.field == field
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": "f"}, "tools"),
        ({"tools": [{}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
         "tools[0].function.strict"),
        ({"template_arguments": 5}, "template_arguments"),
        ({"template_arguments": {"a": {1}}}, "template_arguments.a"),
        ({"template_arguments": {1: 2}}, "template_arguments"),
        ({"continue_final_message": "yes"}, "continue_final_message"),
    ],
)  # fmt: skip
def test_what_goes_with_messages_is_checked_too(fields, field):
    with pytest.raises(InvalidRequest) as refused:
        make_chat_request(HELLO, **fields)
    assert refused.value.field == field


def test_text_parts_are_joined_and_what_is_none_is_absent():
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "are you?"}]
    spoken = {"role": "assistant", "content": "Fine.", "refusal": None, "tool_calls": None}
    made = make_chat_request([{"role": "user", "content": parts}, spoken], tools=None)
    assert [message.content for message in made.messages] == ["How are you?", "Fine."]
    assert made == make_chat_request(
        [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}]
    )
    lax = {"type": "function", "function": {"name": "f", "strict": False}}
    assert make_chat_request(HELLO, tools=[lax]) == make_chat_request(HELLO, tools=[{"name": "f"}])


def test_a_stop_string_may_stand_alone_and_false_is_no_constraint():
    assert make_request("x", stop="END") == make_request("x", stop=["END"])
    assert make_request("x", json_object=False) == make_request("x")
    assert make_request("x", json_object=False, regex="a") == make_request("x", regex="a")
    every_none = dict.fromkeys(["temperature", "stop", "choice", "policy", "json_object", "n"])
    assert make_request("x", **every_none) == make_request("x")
    assert make_request("x", policy="CORE") == make_request("x", policy="core")


def test_numbers_of_numpy_are_numbers():
    made = make_request(
        np.array([1, 2]), temperature=np.float32(0.5), n=np.int64(2), logit_bias={np.int64(3): 1}
    )
    assert made == make_request([1, 2], temperature=0.5, n=2, logit_bias={3: 1.0})


@pytest.mark.parametrize(
    ("name", "near"), [("max_new_tokens", "max_tokens"), ("top-p", "top_p"), ("tool", None)]
)
def test_an_unknown_keyword_is_a_type_error_with_near_names(name, near):
    with pytest.raises(TypeError, match=f"no field {name!r}.*{near or ''}"):
        make_request("x", **{name: 1})
    with pytest.raises(TypeError, match=f"no field {name!r}; did you mean .*{near or 'tools'}"):
        make_chat_request(HELLO, **{name: 1})
    with pytest.raises(TypeError, match="'tools' is for a chat"):
        make_request("x", tools=[])


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["temperature", "seed", "stop", "stop_token_ids", "logit_bias", "text", "user", "choice", "policy",
     "json_schema", "json_object", "tools", "template_arguments", "continue_final_message"]
)  # fmt: skip


@given(ANYTHING, st.dictionaries(NAMES, ANYTHING, max_size=3))
def test_any_value_is_sent_or_refused_with_its_field(what, fields):
    for make, extra in (
        (make_chat_request, fields),
        (make_request, {k: v for k, v in fields.items() if k not in ("tools", "template_arguments", "continue_final_message")}),
    ):  # fmt: skip
        try:
            outcome = make(what, **extra).SerializeToString() is not None
        except InvalidRequest as error:
            outcome = error.field
        assert outcome


@pytest.mark.parametrize("timeout", ["5", 0, -1, float("nan"), float("inf"), True])
def test_a_timeout_is_seconds_above_0(timeout):
    with pytest.raises(InvalidRequest, match="seconds above 0") as refused:
        call_options(timeout, None)
    assert refused.value.field == "timeout"


@pytest.mark.parametrize(
    "metadata",
    [{"Traceparent": "x"}, {"a": 5}, {"a": "ü"}, {"a": b"x"}, {"a b": "x"}, {"": "x"}, ["ab"], [("a",)]],
)  # fmt: skip
def test_metadata_that_cannot_be_sent_is_refused(metadata):
    with pytest.raises(InvalidRequest) as refused:
        call_options(None, metadata)
    assert refused.value.field == "metadata"


def test_metadata_may_be_a_mapping_or_pairs():
    pairs = (("traceparent", "00-a"), ("x-bin", b"\xff"))
    expected = {"timeout": 2.5, "metadata": pairs}
    assert call_options(2.5, dict(pairs)) == call_options(2.5, pairs) == expected
