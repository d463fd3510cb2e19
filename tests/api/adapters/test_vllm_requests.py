"""Whatever a `vllm.grpc.engine.GenerateRequest` says, the engine gets a valid request or the client a field's name."""

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from smg_grpc_proto import vllm_engine_pb2 as pb

from sparserve.api.adapters.vllm_requests import own_request
from sparserve.api.requests import constraint_of, parse_request
from sparserve.engine.engine import Engine
from sparserve.engine.request import GenerationRequest
from sparserve.errors import RequestError

UINT32 = st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1))
INT32 = st.one_of(st.integers(-2, 40), st.integers(-(2**31), 2**31 - 1))
FLOATS = st.one_of(st.floats(0, 2, width=32), st.floats(width=32))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
CONSTRAINTS = st.one_of(
    st.sampled_from(["json_schema", "regex", "grammar", "structural_tag"]).flatmap(
        lambda name: st.fixed_dictionaries({name: TEXTS})
    ),
    st.fixed_dictionaries({"json_object": st.booleans()}),
    st.fixed_dictionaries(
        {"choice": st.builds(pb.ChoiceConstraint, choices=st.lists(TEXTS, max_size=3))}
    ),
)
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": FLOATS,
        "top_p": FLOATS,
        "top_k": UINT32,
        "min_p": FLOATS,
        "frequency_penalty": FLOATS,
        "presence_penalty": FLOATS,
        "repetition_penalty": FLOATS,
        "max_tokens": UINT32,
        "min_tokens": UINT32,
        "stop": st.lists(TEXTS, max_size=3),
        "stop_token_ids": st.lists(UINT32, max_size=3),
        "skip_special_tokens": st.booleans(),
        "ignore_eos": st.booleans(),
        "n": UINT32,
        "logprobs": INT32,
        "prompt_logprobs": INT32,
        "seed": INT32,
        "include_stop_str_in_output": st.booleans(),
        "logit_bias": st.dictionaries(INT32, FLOATS, max_size=3),
        "truncate_prompt_tokens": INT32,
        "grammar_from_first_token": st.booleans(),
    },
)
INPUTS = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"text": TEXTS}),
    st.fixed_dictionaries(
        {"tokenized": st.builds(pb.TokenizedInput, input_ids=st.lists(UINT32, max_size=40))}
    ),
)


@pytest.fixture
def engine(tiny_engine) -> Engine:
    return tiny_engine()


def parsed(engine: Engine, message: pb.GenerateRequest) -> GenerationRequest | RequestError:
    try:
        own = own_request(message, 511)
        request = parse_request(own, engine.tokenizer, 511, engine.policies, None, 0.0)
        constraint_of(own)
        engine.validate(request)
        return request
    except RequestError as refused:
        return refused


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(params=PARAMS, constraint=st.one_of(st.just({}), CONSTRAINTS), prompt=INPUTS)
def test_any_request_is_valid_or_refused_by_a_fields_name(engine, params, constraint, prompt):
    message = pb.GenerateRequest(
        sampling_params=pb.SamplingParams(**params, **constraint), **prompt
    )
    request = parsed(engine, message)
    if isinstance(request, RequestError):
        assert request.field
        return
    asked = message.sampling_params
    assert request.sampling.temperature == (
        asked.temperature if asked.HasField("temperature") else 1.0
    )
    assert request.sampling.n == max(asked.n, 1)
    if prompt.get("tokenized"):
        assert message.tokenized.input_ids[-len(request.prompt_token_ids) :] == list(
            request.prompt_token_ids
        )
