"""Whatever a client sends, it gets an answer that it can act on, and the server serves on."""

import asyncio
import struct
from collections import Counter

import grpc
import hypothesis.strategies as st
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings

from sparserve.client import make_request
from sparserve.v1 import inference_pb2 as pb

ANSWERS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
# What is refused whatever else it says; with all of these set nothing would get past the door.
NOT_BUILT = {
    "Constraint", "priority", "cache_salt", "adapter", "user", "min_p", "typical_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "n", "logit_bias",
    "allowed_token_ids", "min_tokens", "stop_token_ids", "include_stop", "top_logprobs",
    "prompt_logprobs", "refresh_interval",
}  # fmt: skip

FLOATS = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, 1.0, 2.0, 1e-3, 0.5]),
    st.binary(min_size=4, max_size=4).map(lambda b: struct.unpack("<f", b)[0]),
)


def integers(bits: int, signed: bool) -> st.SearchStrategy[int]:
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return st.one_of(st.integers(max(low, -2), 40), st.integers(low, high))


SCALARS = {
    FieldDescriptor.TYPE_FLOAT: FLOATS,
    FieldDescriptor.TYPE_INT32: integers(32, signed=True),
    FieldDescriptor.TYPE_UINT64: integers(64, signed=False),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=300),
    FieldDescriptor.TYPE_ENUM: integers(32, signed=True),
}


def values(field: FieldDescriptor, without: set[str]) -> st.SearchStrategy:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        if field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            return st.dictionaries(SCALARS[entry["key"].type], SCALARS[entry["value"].type])
        one = messages(field.message_type, without)
    else:
        one = SCALARS[field.type]
    return st.lists(one, max_size=40) if field.is_repeated else one


def messages(descriptor: Descriptor, without: set[str]) -> st.SearchStrategy[Message]:
    """Any message of a type, its fields set or not; of a oneof the last one set stays."""
    kind = GetMessageClass(descriptor)
    fields = {
        field.name: values(field, without)
        for field in descriptor.fields
        if field.name not in without
        and (field.message_type is None or field.message_type.name not in without)
    }
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: kind(**given))


@pytest.fixture
async def fuzzed(serving, connect):
    """A server, a connection, and a count of its answers."""
    seen: Counter[str] = Counter()
    async with serving(max_context=48) as server:
        yield server, connect(server), seen
    # Random requests that never came past the checks would prove nothing.
    assert min(seen["OK"], seen["INVALID_ARGUMENT"], seen["UNIMPLEMENTED"]) >= 5, seen


@settings(
    max_examples=150,
    deadline=5000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.one_of(
        messages(pb.GenerateRequest.DESCRIPTOR, {"model", *NOT_BUILT}),
        messages(pb.GenerateRequest.DESCRIPTOR, {"model"}),
    )
)
async def test_any_request_is_served_or_refused_and_the_server_serves_on(fuzzed, request_):
    server, wire, seen = fuzzed
    (answer,) = await asyncio.gather(wire.inference.Generate(request_), return_exceptions=True)
    if isinstance(answer, pb.GenerateResponse):
        assert answer.choices[0].finished.reason != pb.FINISH_REASON_ERROR
        seen["OK"] += 1
    else:
        assert answer.code() in ANSWERS, answer
        assert answer.details()
        seen[answer.code().name] += 1
    normal = await wire.inference.Generate(make_request("hello", max_tokens=1))
    assert normal.usage.completion_tokens == 1
    assert server.is_ready
    assert server.engine.in_flight == server.engine.engine.used_blocks == 0
