"""`inference.GRPCInferenceService`, over gRPC, with elements in `contents` and raw."""

import asyncio
import json
import struct
from collections.abc import AsyncIterator

import grpc
import pytest

from sparserve.errors import EngineFailure
from sparserve.protocols import kserve_pb2 as pb
from sparserve.protocols import kserve_pb2_grpc

INVALID = grpc.StatusCode.INVALID_ARGUMENT
GREEDY = {"temperature": 0, "ignore_eos": True}
EMPTY_FINAL = {"triton_enable_empty_final_response": pb.InferParameter(bool_param=True)}


@pytest.fixture
async def server(serving):
    async with serving(adapters="kserve", adapters_port=0, max_new_tokens=500) as running:
        yield running


@pytest.fixture
async def kserve(server) -> AsyncIterator[kserve_pb2_grpc.GRPCInferenceServiceStub]:
    own = [("grpc.use_local_subchannel_pool", 1)]
    target = f"127.0.0.1:{server.adapters_port}"
    async with grpc.aio.insecure_channel(target, options=own) as channel:
        yield kserve_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensor(name: str, value: object, **changes: object) -> pb.ModelInferRequest.InferInputTensor:
    """One element of text, JSON or truth; `changes` break it."""
    if isinstance(value, bool):
        fields = {"datatype": "BOOL", "contents": pb.InferTensorContents(bool_contents=[value])}
    else:
        data = json.dumps(value).encode() if isinstance(value, dict) else str(value).encode()
        fields = {"datatype": "BYTES", "contents": pb.InferTensorContents(bytes_contents=[data])}
    return pb.ModelInferRequest.InferInputTensor(
        **{"name": name, "shape": [1], **fields, **changes}
    )


def asked(
    text: str = "hello", *, tokens: int = 8, parameters=None, request=None, **inputs
) -> pb.ModelInferRequest:
    """`parameters` join the sampling parameters, `request` holds fields of the message."""
    sampling = {**GREEDY, "max_tokens": tokens, **(parameters or {})}
    tensors = {"text_input": text, "sampling_parameters": sampling, **inputs}
    return pb.ModelInferRequest(
        inputs=[tensor(name, value) for name, value in tensors.items()], **(request or {})
    )


def in_raw(request: pb.ModelInferRequest) -> pb.ModelInferRequest:
    """The same with its elements in raw_input_contents."""
    for given in request.inputs:
        if given.datatype == "BOOL":
            request.raw_input_contents.append(bytes(given.contents.bool_contents))
        else:
            (data,) = given.contents.bytes_contents
            request.raw_input_contents.append(struct.pack("<I", len(data)) + data)
        given.ClearField("contents")
    return request


def values(response: pb.ModelInferResponse) -> dict[str, list]:
    """The elements of each output, wherever they stand."""
    found = {}
    for index, output in enumerate(response.outputs):
        if response.raw_output_contents:
            raw = response.raw_output_contents[index]
            code = {"UINT32": "I", "FP32": "f"}.get(output.datatype)
            elements = (
                list(struct.unpack(f"<{len(raw) // 4}{code}", raw)) if code else unpacked(raw)
            )
        else:
            ((_, elements),) = output.contents.ListFields() or [(None, [])]
        assert list(output.shape) == [len(elements)]
        found[output.name] = list(elements)
    return found


def unpacked(raw: bytes) -> list[bytes]:
    elements = []
    while raw:
        (size,) = struct.unpack_from("<I", raw)
        elements.append(raw[4 : 4 + size])
        raw = raw[4 + size :]
    return elements


def text_of(response: pb.ModelInferResponse) -> str:
    (text,) = values(response)["text_output"]
    return text.decode()


def is_final(response: pb.ModelInferResponse) -> bool:
    return response.parameters["triton_final_response"].bool_param


async def streamed(kserve, *requests: pb.ModelInferRequest) -> list[pb.ModelStreamInferResponse]:
    return [response async for response in kserve.ModelStreamInfer(iter(requests))]


@pytest.mark.parametrize("encode", [lambda request: request, in_raw], ids=["contents", "raw"])
async def test_one_request_one_response(kserve, client, server, encode):
    own = await client.generate("hello", max_tokens=8, **GREEDY)
    told = {f"return_{name}": True for name in ("finish_reason", "num_input_tokens")}
    request = encode(
        asked(
            request={"id": "mine"},
            exclude_input_in_output=True,
            return_num_output_tokens=True,
            return_cumulative_logprob=True,
            **told,
        )
    )
    response = await kserve.ModelInfer(request)
    assert (response.id, response.model_version) == ("mine", "1")
    assert response.model_name == server.engine.engine.metrics.model_name
    assert bool(response.raw_output_contents) == bool(request.raw_input_contents)
    with_logprobs = await client.generate("hello", max_tokens=8, logprobs=True, **GREEDY)
    found = values(response)
    assert found.pop("cumulative_logprob") == [pytest.approx(sum(with_logprobs.logprobs), rel=1e-5)]
    assert found == {
        "text_output": [own.text.encode()],
        "finish_reason": [b"length"],
        "num_input_tokens": [5],
        "num_output_tokens": [8],
    }


async def test_the_prompt_comes_before_the_text_unless_excluded(kserve, client):
    own = (await client.generate("hello", max_tokens=8, **GREEDY)).text
    assert text_of(await kserve.ModelInfer(asked())) == f"hello{own}"
    assert text_of(await kserve.ModelInfer(asked(exclude_input_in_output=False))) == f"hello{own}"
    assert text_of(await kserve.ModelInfer(asked(exclude_input_in_output=True))) == own


async def test_only_the_outputs_that_are_asked_for_come(kserve):
    wanted = pb.ModelInferRequest.InferRequestedOutputTensor(name="num_output_tokens")
    response = await kserve.ModelInfer(asked(request={"outputs": [wanted]}))
    assert values(response) == {"num_output_tokens": [8]}


async def test_several_choices_are_elements_of_one_tensor(kserve):
    sampled = {"n": 3, "temperature": 1, "seed": 4}
    response = await kserve.ModelInfer(
        asked(parameters=sampled, exclude_input_in_output=True, return_finish_reason=True)
    )
    texts = values(response)["text_output"]
    assert len(set(texts)) == 3
    assert values(response)["finish_reason"] == [b"length"] * 3
    pieces = {0: b"", 1: b"", 2: b""}
    responses = await streamed(kserve, asked(parameters=sampled, stream=True))
    for answer in (r.infer_response for r in responses):
        (text,) = values(answer)["text_output"]
        pieces[answer.parameters["index"].int64_param] += text
    assert list(pieces.values()) == texts
    assert [is_final(r.infer_response) for r in responses] == [False] * (len(responses) - 1) + [
        True
    ]


async def test_a_stream_ends_with_its_last_text_or_with_an_empty_response(kserve, client):
    own = await client.generate("hello", max_tokens=8, **GREEDY)
    fields = {"stream": True, "return_finish_reason": True}
    plain = [r.infer_response for r in await streamed(kserve, asked(**fields))]
    assert "".join(map(text_of, plain)) == own.text
    assert [is_final(r) for r in plain] == [False] * (len(plain) - 1) + [True]
    reasons = [values(r)["finish_reason"] for r in plain]
    assert reasons == [[b"None"]] * (len(plain) - 1) + [[b"length"]]
    request = asked(request={"id": "a", "parameters": EMPTY_FINAL}, **fields)
    *texts, last = [r.infer_response for r in await streamed(kserve, request)]
    assert "".join(map(text_of, texts)) == own.text
    assert [is_final(r) for r in texts] == [False] * len(texts)
    assert (last.id, len(last.outputs), is_final(last)) == ("a", 0, True)


async def test_without_stream_a_stream_answers_once(kserve, client):
    own = (await client.generate("hello", max_tokens=8, **GREEDY)).text
    (only,) = await streamed(kserve, asked())
    assert (text_of(only.infer_response), is_final(only.infer_response)) == (f"hello{own}", True)


async def test_requests_of_one_stream_run_together_and_one_that_fails_ends_alone(
    kserve, controlled, server
):
    """The long one was sent first; the short one ends first."""
    requests = [
        asked(tokens=60, stream=True, request={"id": "long"}),
        asked(tokens=5, stream=True, request={"id": "short"}),
        asked(parameters={"temperature": 9}, request={"id": "bad"}),
    ]
    with controlled(server) as forward:
        forward.seconds = 0.005
        responses = await streamed(kserve, *requests)
    finals = [r.infer_response.id for r in responses if is_final(r.infer_response)]
    assert sorted(finals) == ["bad", "long", "short"]
    assert finals.index("short") < finals.index("long")
    (failed,) = [r for r in responses if r.error_message]
    assert failed.infer_response.id == "bad"
    assert failed.error_message.startswith("INVALID_ARGUMENT: input sampling_parameters: ")
    assert "temperature is 9; it must be in [0, 2]" in failed.error_message


async def test_a_stream_that_is_cancelled_frees_all_of_its_requests(
    kserve, server, controlled, until
):
    with controlled(server) as forward:
        forward.seconds = 0.01
        call = kserve.ModelStreamInfer()
        for _ in range(3):
            await call.write(asked(tokens=400, stream=True))
        await until(lambda: server.engine.engine.num_running == 3)
        await call.read()
        call.cancel()
        await until(lambda: server.engine.engine.used_blocks == 0)
        assert server.engine.in_flight == 0
    assert forward.calls < 100


async def test_a_client_that_leaves_a_unary_call_frees_its_blocks(
    kserve, server, controlled, until
):
    with controlled(server) as forward:
        forward.seconds = 0.01
        call = asyncio.ensure_future(kserve.ModelInfer(asked(tokens=400)))
        await until(lambda: server.engine.engine.used_blocks > 0)
        call.cancel()
        await until(lambda: server.engine.engine.used_blocks == 0)
    assert forward.calls < 100


async def test_a_timeout_ends_a_request_and_not_its_stream(kserve, server, controlled):
    short = {"parameters": {"timeout": pb.InferParameter(int64_param=100_000)}, "id": "late"}
    with controlled(server) as forward:
        forward.seconds = 0.01
        requests = [asked(tokens=400, request=short), asked(tokens=30, request={"id": "good"})]
        first, second = await streamed(kserve, *requests)
    assert (first.infer_response.id, second.infer_response.id) == ("late", "good")
    assert first.error_message.startswith("DEADLINE_EXCEEDED")


async def test_an_engine_that_fails_is_told_on_the_stream(kserve, server, controlled):
    with controlled(server) as forward:
        forward.fail(RuntimeError("broken"), times=1)
        (failed,) = await streamed(kserve, asked())
    assert failed.error_message.startswith("INTERNAL: ")
    assert "error id" in failed.error_message
    assert "broken" not in failed.error_message


async def test_parameters_are_those_of_our_own_api(kserve, client):
    sampled = {"temperature": "1.2", "top_k": 30, "top_p": "0.9", "seed": 3}  # as Triton's examples
    answer = await kserve.ModelInfer(asked(parameters=sampled, exclude_input_in_output=True))
    own = await client.generate(
        "hello", temperature=1.2, top_k=30, top_p=0.9, seed=3, max_tokens=8, ignore_eos=True
    )
    assert text_of(answer) == own.text
    stop = own.text[3]
    stopped = asked(
        parameters={**sampled, "top_k": 30, "stop": stop, "include_stop_str_in_output": True},
        exclude_input_in_output=True,
    )
    text = text_of(await kserve.ModelInfer(stopped))
    assert text == own.text[: own.text.index(stop) + 1]
    only = {"allowed_token_ids": [32], "logit_bias": {"32": 1}, "min_tokens": 2, "policy": "dense"}
    assert text_of(await kserve.ModelInfer(asked("x", parameters=only))) == "x" + 8 * "A"


async def test_a_request_chooses_its_sparsity(kserve, client):
    sparse = {"policy": "core", "density": 0.4}
    prompt = "a prompt of some tokens"
    asks = [
        asked(prompt, parameters=p, tokens=24, exclude_input_in_output=True) for p in ({}, sparse)
    ]
    dense_text, sparse_text = [text_of(await kserve.ModelInfer(ask)) for ask in asks]
    own = await client.generate(prompt, max_tokens=24, **GREEDY, **sparse)
    assert sparse_text == own.text != dense_text
    needs_index = asked(prompt, parameters={"target_kl": 0.1, "policy": "core"})
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await kserve.ModelInfer(needs_index)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_structured_output(kserve):
    limits = {"ignore_eos": False, "structured_outputs": {"choice": ["left", "right"]}}
    request = asked(parameters=limits, tokens=20, exclude_input_in_output=True)
    assert text_of(await kserve.ModelInfer(request)) in ("left", "right")


TEXT, STREAM = "text_input", "stream"
BAD_TENSORS = [
    ([], ["text_input is missing", "BYTES", "[1]"]),
    ([tensor("txt", "x")], ["'txt' is unknown", "text_input, stream"]),
    ([tensor(TEXT, "x", shape=[2])], ["text_input has shape [2]", "[1]"]),
    ([tensor(TEXT, "x", shape=[])], ["text_input has shape []"]),
    ([tensor(TEXT, "x", datatype="INT32")], ["text_input has data type 'INT32'", "BYTES"]),
    ([tensor(TEXT, "x"), tensor(TEXT, "y")], ["text_input is given twice"]),
    (
        [tensor(TEXT, "x", contents=pb.InferTensorContents(bytes_contents=[b"a", b"b"]))],
        ["text_input has 2 bytes_contents", "1 bytes_contents"],
    ),
    (
        [tensor(TEXT, "x", contents=pb.InferTensorContents(int_contents=[1]))],
        ["text_input has 1 int_contents", "1 bytes_contents"],
    ),
    ([tensor(TEXT, "x", contents=None)], ["text_input has nothing"]),
    (
        [tensor(TEXT, "x", contents=pb.InferTensorContents(bytes_contents=[b"\xff"]))],
        ["text_input is not UTF-8"],
    ),
    (
        [tensor(TEXT, "x", parameters={"shared_memory_region": pb.InferParameter()})],
        ["text_input has parameters (shared_memory_region)"],
    ),
    (
        [tensor(TEXT, "x"), tensor(STREAM, True), tensor("exclude_input_in_output", False)],
        ["exclude_input_in_output is false", "stream"],
    ),
    ([tensor(TEXT, "x"), tensor(STREAM, True)], ["stream is true", "ModelStreamInfer"]),
]
BAD_RAW = [
    ([b"\1\0\0\0x", b"\1"], ["2 raw_input_contents for 1 inputs"]),
    ([b"\2\0\0\0x"], ["text_input says that it has 2 bytes, and 1 follow"]),
    ([b"x"], ["text_input has 1 raw bytes"]),
]
BAD_PARAMETERS = [
    ("{", ["Invalid JSON"]),
    ("[]", ["must be a JSON object"]),
    (json.dumps({"x" * 9000: 1}), ["xxx"]),
    ('{"heat": 1}', ["'heat' is unknown", "temperature, top_p"]),
    ('{"temperature": "warm"}', ["temperature is 'warm'", "valid number"]),
    ('{"temperature": 3}', ["sampling.temperature is 3", "[0, 2]"]),
    ('{"temperature": NaN}', ["temperature"]),
    ('{"max_tokens": 501}', ["max_tokens is 501", "500 at most"]),
    ('{"max_tokens": 99999999999}', ["max_tokens is 99999999999"]),
    ('{"seed": -1}', ["seed is -1"]),
    ('{"policy": "fast"}', ["policy 'fast' is unknown", "dense, core"]),
    ('{"density": 2}', ["density is 2", "(0, 1]"]),
    (json.dumps({"stop": [1] * 100_000}), ["characters, the limit is"]),
    (json.dumps({"stop": ["a", 1, 2]}), ["stop"]),
    ('{"structured_outputs": {}}', ["structured_outputs has nothing", "json, regex"]),
    ('{"structured_outputs": {"shape": 1}}', ["structured_outputs.shape"]),
]
BAD_FIELDS = [
    ({"model_version": "2"}, ["version '2'", "'1'"]),
    ({"id": "x" * 300}, ["id has 300 characters", "256"]),
    (
        {"outputs": [pb.ModelInferRequest.InferRequestedOutputTensor(name="words")]},
        ["output 'words' is unknown", "text_output"],
    ),
    ({"parameters": {"priority": pb.InferParameter(uint64_param=1)}}, ["'priority'", "timeout"]),
    ({"parameters": {"timeout": pb.InferParameter(int64_param=0)}}, ["'timeout'", "over 0"]),
]


async def test_what_cannot_work_is_refused_with_tensor_value_and_what_is_allowed(kserve):
    cases = [(pb.ModelInferRequest(inputs=tensors), named) for tensors, named in BAD_TENSORS]
    one = [tensor(TEXT, "x", contents=None)]
    cases += [(pb.ModelInferRequest(inputs=one, raw_input_contents=r), n) for r, n in BAD_RAW]
    both = pb.ModelInferRequest(inputs=[tensor(TEXT, "x")], raw_input_contents=[b"\1\0\0\0x"])
    cases += [(both, ["text_input has contents beside raw_input_contents"])]
    for text, named in BAD_PARAMETERS:
        inputs = [tensor(TEXT, "x"), tensor("sampling_parameters", text)]
        cases.append((pb.ModelInferRequest(inputs=inputs), ["sampling_parameters", *named]))
    cases += [(asked(request=fields), named) for fields, named in BAD_FIELDS]
    for request, named in cases:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await kserve.ModelInfer(request)
        told = refused.value.details()
        missing = [part for part in named if part not in told]
        assert (refused.value.code(), missing) == (INVALID, []), told


async def test_a_prompt_that_is_too_long_or_empty_is_refused(kserve, details_of):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await kserve.ModelInfer(asked("x" * 600))
    assert details_of(refused.value)["ErrorInfo"].reason == "PROMPT_TOO_LONG"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await kserve.ModelInfer(asked(""))
    assert (refused.value.code(), "empty" in refused.value.details()) == (INVALID, True)


async def test_another_model_is_not_found(kserve):
    requests = [
        kserve.ModelInfer(asked(request={"model_name": "other"})),
        kserve.ModelReady(pb.ModelReadyRequest(name="other")),
        kserve.ModelMetadata(pb.ModelMetadataRequest(name="other")),
        kserve.ModelConfig(pb.ModelConfigRequest(name="other")),
        kserve.ModelStatistics(pb.ModelStatisticsRequest(name="other")),
    ]
    for call in requests:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert "'other' is not served here" in refused.value.details()


async def test_statistics_are_the_servers_own_counts(kserve, server, controlled, until):
    async def counted() -> pb.ModelStatistics:
        answer = await kserve.ModelStatistics(pb.ModelStatisticsRequest())
        return answer.model_stats[0]

    before = await counted()
    assert (before.inference_count, before.last_inference) == (0, 0)
    await kserve.ModelInfer(asked(tokens=20))
    await streamed(kserve, asked(tokens=5, stream=True), asked(tokens=5))
    with controlled(server) as forward:
        forward.seconds = 0.01
        left = asyncio.ensure_future(kserve.ModelInfer(asked(tokens=400)))
        await until(lambda: server.engine.engine.used_blocks > 0)
        left.cancel()
        while (after := await counted()).inference_stats.fail.count == 0:
            await asyncio.sleep(0.005)
    after = await counted()
    stats = after.inference_stats
    assert (after.inference_count, stats.success.count, stats.fail.count) == (3, 3, 1)
    assert after.execution_count - before.execution_count >= 20
    assert after.last_inference > 1.7e12
    assert stats.queue.count == 4
    assert stats.success.ns > stats.compute_infer.ns + stats.compute_input.ns
    assert min(stats.compute_infer.ns, stats.compute_input.ns, stats.queue.ns) > 0


async def test_readiness_goes_when_the_server_drains(kserve, server):
    async def told() -> tuple[bool, bool, bool]:
        return (
            (await kserve.ServerLive(pb.ServerLiveRequest())).live,
            (await kserve.ServerReady(pb.ServerReadyRequest())).ready,
            (await kserve.ModelReady(pb.ModelReadyRequest())).ready,
        )

    assert await told() == (True, True, True)
    server._welcoming = False  # as for --drain-delay seconds
    assert await told() == (True, False, False)
    assert (await kserve.ModelInfer(asked())).model_name
    await server.engine.drain(0)
    assert await told() == (True, False, False)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await kserve.ModelInfer(asked())
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_broken_engine_is_not_live(kserve, server):
    server.engine._break(EngineFailure("x"))
    assert not (await kserve.ServerLive(pb.ServerLiveRequest())).live


async def test_each_request_of_a_stream_has_its_line_in_the_log(kserve, caplog):
    caplog.set_level("INFO", "sparserve.access")
    await streamed(kserve, asked(tokens=3), asked(parameters={"min_p": 3}))
    lines = [r for r in caplog.records if r.message == "request of a stream ended"]
    told = {line.code: line for line in lines}
    assert told["OK"].completion_tokens == 3
    assert told["OK"].finish_reason == "length"
    assert told["INVALID_ARGUMENT"].field == "inputs[sampling_parameters].min_p"
    assert "hello" not in caplog.text


async def test_a_full_queue_is_told_on_the_stream(serving, controlled, until):
    settings = {"adapters": "kserve", "adapters_port": 0, "max_running": 1, "max_waiting": 1}
    async with (
        serving(**settings) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.adapters_port}") as channel,
    ):
        kserve = kserve_pb2_grpc.GRPCInferenceServiceStub(channel)
        with controlled(server) as forward:
            forward.hold()
            taken = [asyncio.ensure_future(kserve.ModelInfer(asked(tokens=2))) for _ in range(2)]
            await until(lambda: server.engine.in_flight == 2)
            (refused,) = await streamed(kserve, asked())
            forward.release()
            await asyncio.gather(*taken)
    assert refused.error_message.startswith("RESOURCE_EXHAUSTED: the queue is full")
