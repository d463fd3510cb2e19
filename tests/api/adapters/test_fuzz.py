"""Whatever a client of an adapter sends, it gets an answer that it can act on, and the server serves on."""

import json
import struct
from collections import Counter

import grpc
import hypothesis.strategies as st
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Struct
from hypothesis import HealthCheck, given, settings

from sparserve.api.adapters.kserve_parameters import SamplingParameters
from sparserve.protocols import kserve_pb2, vllm_inference_pb2

EXAMPLES = 100
ANSWERS = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED}
SEARCH = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def integers(low: int, high: int) -> st.SearchStrategy[int]:
    return st.one_of(st.integers(max(low, -2), 40), st.integers(low, high))


SCALARS = {
    FieldDescriptor.TYPE_FLOAT: st.one_of(
        st.floats(0, 2, width=32),
        st.binary(min_size=4, max_size=4).map(lambda b: struct.unpack("<f", b)[0]),
    ),
    FieldDescriptor.TYPE_INT32: integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: integers(0, 2**32 - 1),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: TEXTS,
}
# A name of another model is always NOT_FOUND, and a compiler of constraints has tests of its own.
WITHOUT = {"model", "json", "regex", "choice", "grammar", "json_object"}


def values(field: FieldDescriptor) -> st.SearchStrategy:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        if field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            return st.dictionaries(SCALARS[entry["key"].type], SCALARS[entry["value"].type])
        one = messages(field.message_type)
    else:
        one = SCALARS[field.type]
    return st.lists(one, max_size=20) if field.is_repeated else one


def messages(descriptor: Descriptor) -> st.SearchStrategy[Message]:
    """Any message of a type with a few of its fields set; of a oneof the last one set stays."""
    kind = GetMessageClass(descriptor)
    if kind is Struct:
        return st.just(Struct())
    fields = {f.name: values(f) for f in descriptor.fields if f.name not in WITHOUT}
    if not fields:
        return st.just(kind())
    some = st.lists(st.sampled_from(sorted(fields)), max_size=2, unique=True)
    return some.flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in names})
    ).map(lambda given: kind(**given))


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), integers(-(2**70), 2**70), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)
NAMES = sorted(set(SamplingParameters.model_fields) - {"structured_outputs"})
PARAMETERS = st.one_of(
    st.dictionaries(st.sampled_from([*NAMES, "other"]), JSON, max_size=2).map(json.dumps),
    st.sampled_from(NAMES).flatmap(
        lambda name: st.one_of(st.integers(0, 2), st.floats(0, 1)).map(
            lambda value: json.dumps({name: value})
        )
    ),
    TEXTS,
).map(str.encode)


@pytest.fixture
async def fuzzed(serving):
    """A server, a connection to its adapters, and a count of its answers."""
    async with (
        serving(adapters="kserve,vllm-inference", adapters_port=0, max_context=20) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.adapters_port}") as channel,
    ):
        yield server, channel, Counter()


async def check(fuzzed, call: grpc.aio.Call, *, streams: bool = False) -> None:
    """The status is one that a client can act on, and nothing is left of the request."""
    server, _, seen = fuzzed
    try:
        if streams:
            async for _ in call:
                pass
        else:
            await call
        code, told = grpc.StatusCode.OK, "fine"
    except grpc.aio.AioRpcError as error:
        code, told = error.code(), error.details()
    assert told
    assert code in (*ANSWERS, grpc.StatusCode.OK), told
    seen[code] += 1
    assert server.is_ready
    assert server.engine.in_flight == server.engine.engine.used_blocks == 0
    if seen.total() == EXAMPLES:
        # Random requests that never came past the checks would prove nothing.
        assert min(seen[grpc.StatusCode.OK], seen[grpc.StatusCode.INVALID_ARGUMENT]) >= 5, seen


@SEARCH
@given(message=messages(vllm_inference_pb2.GenerateRequest.DESCRIPTOR), text=TEXTS)
async def test_any_request_of_vllms_protocol(fuzzed, message, text):
    if not message.WhichOneof("prompt"):
        message.text = text or "x"
    call = fuzzed[1].unary_stream(
        "/vllm.Inference/GenerateStream",
        type(message).SerializeToString,
        vllm_inference_pb2.GenerateResponse.FromString,
    )
    await check(fuzzed, call(message), streams=True)


@SEARCH
@given(parameters=PARAMETERS, raw=st.one_of(st.none(), st.none(), st.binary(max_size=8)))
async def test_any_parameters_and_raw_bytes_of_kserves_protocol(fuzzed, parameters, raw):
    message = kserve_pb2.ModelInferRequest()
    if raw is None:
        raw = b"\1\0\0\0x"
    elements = [raw, len(parameters).to_bytes(4, "little") + parameters]
    for name in ("text_input", "sampling_parameters"):
        message.inputs.add(name=name, datatype="BYTES", shape=[1])
    message.raw_input_contents.extend(elements)
    call = fuzzed[1].unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        type(message).SerializeToString,
        kserve_pb2.ModelInferResponse.FromString,
    )
    await check(fuzzed, call(message))
