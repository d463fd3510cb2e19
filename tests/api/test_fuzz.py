"""Whatever a client sends, it gets an answer that it can act on, and the server serves on."""

import struct
from collections import Counter

import grpc
import hypothesis.strategies as st
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from hypothesis import HealthCheck, given, settings

from sparserve.client import make_chat_request, make_request
from sparserve.v1 import control_pb2, inference_pb2

EXAMPLES = 150
ANSWERS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
# A drained server serves nobody: tests/api/test_control.py has Drain. A name of another model is
# always NOT_FOUND, and a compiler of constraints has tests of its own.
LEFT_OUT = {"Drain"}
WITHOUT = {"model"}
METHODS = {
    method.name: method
    for file in (inference_pb2, control_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if method.name not in LEFT_OUT
}

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
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
    FieldDescriptor.TYPE_STRING: st.one_of(
        TEXTS, st.sampled_from(["{}", "user", '{"type": "object"}'])
    ),
    FieldDescriptor.TYPE_ENUM: integers(32, signed=True),
}
STRUCTS = st.recursive(
    st.one_of(
        st.just(Value()),
        st.floats().map(lambda number: Value(number_value=number)),
        TEXTS.map(lambda text: Value(string_value=text)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda v: Value(list_value=ListValue(values=v))),
        st.dictionaries(TEXTS, inner, max_size=3).map(
            lambda fields: Value(struct_value=Struct(fields=fields))
        ),
    ),
).flatmap(lambda value: TEXTS.map(lambda name: Struct(fields={name: value})))


def values(field: FieldDescriptor) -> st.SearchStrategy:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        if field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            return st.dictionaries(SCALARS[entry["key"].type], SCALARS[entry["value"].type])
        one = messages(field.message_type)
    else:
        one = SCALARS[field.type]
    return st.lists(one, max_size=40) if field.is_repeated else one


def messages(descriptor: Descriptor) -> st.SearchStrategy[Message]:
    """Any message of a type with a few of its fields set; of a oneof the last one set stays."""
    if descriptor.full_name == Struct.DESCRIPTOR.full_name:
        return STRUCTS
    kind = GetMessageClass(descriptor)
    fields = {f.name: values(f) for f in descriptor.fields if f.name not in WITHOUT}
    if not fields:
        return st.just(kind())
    # With all of them set, one is sure to be refused, and nothing gets past the door.
    some = st.lists(st.sampled_from(sorted(fields)), max_size=3, unique=True)
    return some.flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in names})
    ).map(lambda given: kind(**given))


# What most of the others need in order to be served.
GOOD = {
    "Generate": make_request("hello"),
    "GenerateStream": make_request([1, 2]),
    "Chat": make_chat_request([{"role": "user", "content": "hi"}]),
    "ChatStream": make_chat_request([{"role": "user", "content": "hi"}]),
}


@pytest.fixture
async def fuzzed(serving, connect):
    """A server, a connection, and a count of its answers."""
    seen: Counter[str] = Counter()
    async with serving(max_context=48) as server:
        yield server, connect(server), seen


async def answer_of(wire, method: MethodDescriptor, request_: Message) -> str:
    """The name of the status that a call ends with: one that its client can act on."""
    stub = wire.inference if method.containing_service.name == "InferenceService" else wire.control
    call = getattr(stub, method.name)(request_)
    try:
        if method.server_streaming:
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError:
        code = await call.code()
        assert code in ANSWERS, (code, await call.details())
        assert await call.details()
        return code.name
    return "OK"


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
@pytest.mark.parametrize("name", METHODS)
async def test_any_request_is_served_or_refused_and_the_server_serves_on(fuzzed, name, data):
    server, wire, seen = fuzzed
    request_ = data.draw(messages(METHODS[name].input_type))
    if name in GOOD and data.draw(st.booleans()):
        good = type(request_)()
        good.CopyFrom(GOOD[name])
        good.MergeFrom(request_)
        request_ = good
    seen[await answer_of(wire, METHODS[name], request_)] += 1
    normal = await wire.inference.Generate(make_request("hello", max_tokens=1))
    assert normal.usage.completion_tokens == 1
    assert server.is_ready
    assert server.engine.in_flight == server.engine.engine.used_blocks == 0
    if name in GOOD and seen.total() == EXAMPLES:
        # Random requests that never came past the checks would prove nothing.
        assert min(seen["OK"], seen["INVALID_ARGUMENT"]) >= 5, seen
