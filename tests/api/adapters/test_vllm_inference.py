"""`vllm.Inference` and `vllm.Control`, over gRPC."""

import asyncio
import json
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sparserve.protocols import vllm_control_pb2 as control_pb
from sparserve.protocols import vllm_control_pb2_grpc, vllm_inference_pb2_grpc
from sparserve.protocols import vllm_inference_pb2 as pb

INVALID, UNIMPLEMENTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED
Finish = pb.FinishInfo
GREEDY = {"temperature": 0, "ignore_eos": True, "token_ids": True}


@pytest.fixture
async def server(serving):
    async with serving(adapters="vllm-inference", adapters_port=0, max_new_tokens=500) as running:
        yield running


@pytest.fixture
async def channel(server) -> AsyncIterator[grpc.aio.Channel]:
    own = [("grpc.use_local_subchannel_pool", 1)]
    target = f"127.0.0.1:{server.adapters_port}"
    async with grpc.aio.insecure_channel(target, options=own) as opened:
        yield opened


@pytest.fixture
def inference(channel):
    return vllm_inference_pb2_grpc.InferenceStub(channel)


@pytest.fixture
def control(channel):
    return vllm_control_pb2_grpc.ControlStub(channel)


def asked(text: str = "hello", *, tokens: int = 8, **fields) -> pb.GenerateRequest:
    stopping = pb.StoppingCriteria(max_new_tokens=tokens, ignore_eos=True)
    return pb.GenerateRequest(**{"text": text, "stopping": stopping, **fields})


def by_ids(text: bytes, **fields) -> pb.GenerateRequest:
    request = asked(**fields)
    request.token_ids.ids.extend(text)
    return request


async def test_a_stream_tells_of_the_prompt_first_and_of_the_end_last(inference, client):
    options = pb.ResponseOptions(prompt_token_ids=True, output_token_ids=True)
    responses = [r async for r in inference.GenerateStream(asked(response=options))]
    prompt = await client.tokenize("hello")
    assert responses[0].prompt_info == pb.PromptInfo(
        num_prompt_tokens=5, token_ids=prompt.token_ids
    )
    assert not any(r.HasField("prompt_info") for r in responses[1:])
    outputs = [r.outputs for r in responses]
    assert [o.HasField("finish_info") for o in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].finish_info == Finish(num_output_tokens=8, finish_reason=Finish.LENGTH)
    ids = [i for o in outputs for i in o.token_ids]
    assert sum(o.num_tokens for o in outputs) == len(ids) == 8
    own = await client.generate("hello", max_tokens=8, **GREEDY)
    assert (tuple(ids), "".join(o.text for o in outputs)) == (own.token_ids, own.text)


async def test_one_response_holds_what_a_stream_tells(inference):
    options = pb.ResponseOptions(
        output_token_ids=True,
        output_logprobs=True,
        output_candidates=pb.CandidateTokens(top_n=3),
        prompt_logprobs=True,
        prompt_candidates=pb.CandidateTokens(top_n=2),
    )
    request = asked(response=options)
    whole = await inference.Generate(request)
    joined = pb.SequenceOutput()
    async for response in inference.GenerateStream(request):
        if response.HasField("prompt_info"):
            assert response.prompt_info == whole.prompt_info
        text, tokens = (
            joined.text + response.outputs.text,
            joined.num_tokens + response.outputs.num_tokens,
        )
        joined.MergeFrom(response.outputs)
        joined.text, joined.num_tokens = text, tokens
    assert joined == whole.outputs
    assert joined.num_tokens == 8


async def test_logprobs_ranks_and_candidates_are_those_of_our_own_api(inference, client):
    options = pb.ResponseOptions(
        output_token_ids=True,
        output_logprobs=True,
        output_candidates=pb.CandidateTokens(top_n=3),
        prompt_logprobs=True,
        prompt_candidates=pb.CandidateTokens(top_n=2),
    )
    sampling = pb.RandomSampling(seed=5)
    answer = await inference.Generate(asked(temperature=1.5, sampling=sampling, response=options))
    own = await client.generate(
        "hello",
        max_tokens=8,
        ignore_eos=True,
        temperature=1.5,
        seed=5,
        top_logprobs=3,
        prompt_logprobs=2,
    )
    output, prompt = answer.outputs, answer.prompt_info
    tokens = own.choices[0].tokens
    assert list(output.token_ids) == [t.id for t in tokens]
    assert list(output.logprobs) == [t.logprob for t in tokens]
    top = [[t.id for t in token.top] for token in tokens]
    ranks = [ids.index(t.id) + 1 if t.id in ids else 0 for t, ids in zip(tokens, top, strict=True)]
    assert list(output.ranks) == ranks
    assert 0 in ranks  # so hot that some are not among three
    told = [[c.id for c in info.tokens] for info in output.candidate_tokens]
    assert told == [[i for i in ids if i != t.id] for t, ids in zip(tokens, top, strict=True)]
    assert all(c.rank >= 1 for info in output.candidate_tokens for c in info.tokens)
    assert list(prompt.logprobs) == [t.logprob or 0.0 for t in own.prompt]
    assert len(prompt.candidate_tokens) == 5
    assert len(prompt.token_ids) == 0


async def test_text_and_ids_are_told_as_asked(inference):
    neither = await inference.Generate(
        asked(response=pb.ResponseOptions(output_text=False, output_token_ids=False))
    )
    assert (neither.outputs.text, len(neither.outputs.token_ids)) == ("", 0)
    assert neither.outputs.num_tokens == 8
    assert (await inference.Generate(asked())).outputs.text


async def test_temperature_is_greedy_by_default_and_seeds_repeat(inference):
    greedy = [(await inference.Generate(asked(tokens=20))).outputs.text for _ in range(2)]
    assert greedy[0] == greedy[1]

    async def sampled(seed: int) -> str:
        request = asked(tokens=20, temperature=1.0, sampling=pb.RandomSampling(seed=seed))
        return (await inference.Generate(request)).outputs.text

    assert await sampled(-1) == await sampled(-1) != await sampled(1)


async def test_token_ids_in_and_truncation_keep_the_end_of_the_prompt(inference):
    options = pb.ResponseOptions(prompt_token_ids=True)
    for request in (asked("hello"), by_ids(bytes([1, 2, 3, 4, 5]))):
        request.response.CopyFrom(options)
        whole = (await inference.Generate(request)).prompt_info.token_ids
        request.truncate_prompt_tokens = 2
        cut = (await inference.Generate(request)).prompt_info.token_ids
        assert (len(whole), list(cut)) == (5, list(whole[-2:]))


async def test_several_sequences_stream_each_to_its_end(inference):
    request = asked(temperature=1.0, sampling=pb.RandomSampling(num_sequences=3, seed=1))
    ends, tokens = {}, {0: 0, 1: 0, 2: 0}
    async for response in inference.GenerateStream(request):
        tokens[response.outputs.index] += response.outputs.num_tokens
        if response.outputs.HasField("finish_info"):
            ends[response.outputs.index] = response.outputs.finish_info.num_output_tokens
    assert ends == tokens == {0: 8, 1: 8, 2: 8}


async def test_each_end_is_told_with_its_cause(inference, client):
    text = (await client.generate("hello", max_tokens=40, **GREEDY)).text
    stop = text[5:7]
    stopping = pb.StoppingCriteria(max_new_tokens=40, stop_strings=[stop], ignore_eos=True)
    by_string = (await inference.Generate(asked(stopping=stopping))).outputs
    assert by_string.finish_info.stop_string == stop
    assert by_string.text == text[: text.index(stop)]
    stopping.include_stop_strings = True
    kept = (await inference.Generate(asked(stopping=stopping))).outputs
    assert kept.text == by_string.text + stop

    async def forced(token_id: int, **fields) -> pb.FinishInfo:
        only = pb.DecodingParameters(allowed_token_ids=[token_id])
        stopping = pb.StoppingCriteria(max_new_tokens=4, **fields)
        request = asked(decoding=only, stopping=stopping)
        return (await inference.Generate(request)).outputs.finish_info

    eos = 257
    assert await forced(65, stop_token_ids=[65]) == Finish(
        num_output_tokens=1, finish_reason=Finish.STOP, stop_token_id=65
    )
    assert await forced(eos) == Finish(
        num_output_tokens=1, finish_reason=Finish.STOP, eos_token_id=eos
    )


CONSTRAINTS = [
    ({"regex": "[ab]{3}"}, lambda text: set(text) <= {"a", "b"} and len(text) == 3),
    (
        {"choice": pb.DecodingParameters.StringChoices(choices=["yes", "no"])},
        lambda text: text in ("yes", "no"),
    ),
    ({"json": '{"enum": [7]}'}, lambda text: json.loads(text) == 7),
    ({"grammar": 'root ::= "x" "y"'}, lambda text: text == "xy"),
    ({"json_object": False}, lambda text: True),
]


async def test_structured_output(inference, details_of):
    stopping = pb.StoppingCriteria(max_new_tokens=30)
    for structured, fits in CONSTRAINTS:
        request = asked(decoding=pb.DecodingParameters(**structured), stopping=stopping)
        text = (await inference.Generate(request)).outputs.text
        assert fits(text), (structured, text)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await inference.Generate(asked(decoding=pb.DecodingParameters(regex="(")))
    assert refused.value.code() is INVALID
    assert details_of(refused.value)["BadRequest"].field_violations[0].field == "decoding.regex"


async def test_bypassing_the_prefix_cache_computes_the_whole_prompt(inference, server):
    metrics = server.engine.engine.metrics
    request = asked("x" * 100, tokens=1)
    await inference.Generate(request)
    await inference.Generate(request)
    hits = metrics.prefix_cache_hits._value.get()
    assert hits > 0
    request.kv.bypass_prefix_cache = True
    await inference.Generate(request)
    assert metrics.prefix_cache_hits._value.get() == hits


async def test_the_lower_priority_number_goes_first(serving, controlled, until):
    settings = {"adapters": "vllm-inference", "adapters_port": 0, "max_running": 1}
    async with (
        serving(**settings) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.adapters_port}") as channel,
    ):
        inference, done = vllm_inference_pb2_grpc.InferenceStub(channel), []

        async def call(name: str, priority: int) -> None:
            await inference.Generate(asked(tokens=2, priority=priority, request_id=name))
            done.append(name)

        with controlled(server) as forward:
            forward.hold()
            calls = [asyncio.create_task(call("running", 0))]
            await until(lambda: forward.calls == 1)
            for waiting, (name, priority) in enumerate([("late", 5), ("soon", -5)], 1):
                calls.append(asyncio.create_task(call(name, priority)))
                await until(lambda n=waiting: server.engine.in_flight == 1 + n)
            forward.release()
            await asyncio.gather(*calls)
    assert done == ["running", "soon", "late"]


REFUSALS = [
    ({"priority": -101}, INVALID, ["priority is -101", "[-100, 100]"]),
    ({"temperature": 3}, INVALID, ["temperature is 3", "[0, 2]"]),
    ({"sampling": pb.RandomSampling(top_p=2)}, INVALID, ["sampling.top_p is 2", "(0, 1]"]),
    ({"sampling": pb.RandomSampling(top_k=2**31)}, INVALID, ["sampling.top_k", "2147483647"]),
    (
        {"sampling": pb.RandomSampling(num_sequences=2)},
        INVALID,
        ["sampling.num_sequences is 2", "GenerateStream"],
    ),
    (
        {"decoding": pb.DecodingParameters(presence_penalty=3)},
        INVALID,
        ["decoding.presence_penalty is 3", "[-2, 2]"],
    ),
    (
        {"stopping": pb.StoppingCriteria(max_new_tokens=10**6)},
        INVALID,
        ["stopping.max_new_tokens is 1000000", "at most"],
    ),
    (
        {"response": pb.ResponseOptions(output_candidates=pb.CandidateTokens(top_n=65))},
        INVALID,
        ["response.output_candidates.top_n is 65", "[0, 64]"],
    ),
    ({"model": "other"}, grpc.StatusCode.NOT_FOUND, ["other"]),
    ({"lora_name": "a"}, UNIMPLEMENTED, ["lora_name", "merge"]),
    ({"media": [pb.MediaItem()]}, UNIMPLEMENTED, ["media", "text only"]),
    (
        {"decoding": pb.DecodingParameters(structural_tag="{}")},
        UNIMPLEMENTED,
        ["decoding.structural_tag", "json"],
    ),
    (
        {"response": pb.ResponseOptions(output_candidates=pb.CandidateTokens(all=True))},
        UNIMPLEMENTED,
        ["response.output_candidates.all", "top_n"],
    ),
    (
        {"kv": pb.KVCacheParameters(kv_transfer_params=Struct())},
        UNIMPLEMENTED,
        ["kv.kv_transfer_params"],
    ),
]


async def test_what_cannot_be_served_is_refused_by_its_name(inference):
    for fields, code, named in REFUSALS:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await inference.Generate(asked(**fields))
        told = refused.value.details()
        assert (refused.value.code(), [part for part in named if part not in told]) == (code, []), (
            told
        )


async def test_bad_prompts_are_refused(inference, details_of):
    empty = pb.GenerateRequest()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await inference.Generate(empty)
    assert (refused.value.code(), "no prompt" in refused.value.details()) == (INVALID, True)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await inference.Generate(by_ids(b"a" * 600))
    assert "600 tokens, the limit is 511" in refused.value.details()
    assert details_of(refused.value)["ErrorInfo"].reason == "PROMPT_TOO_LONG"
    for token_id in (259, 2**32 - 1):
        outside = asked()
        outside.token_ids.ids.append(token_id)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await inference.Generate(outside)
        assert refused.value.code() is INVALID
        assert str(token_id) in refused.value.details()


async def test_a_client_that_leaves_frees_its_blocks(server, inference, controlled, until):
    with controlled(server) as forward:
        forward.seconds = 0.01
        call = inference.GenerateStream(asked(tokens=400))
        await call.read()
        assert server.engine.engine.used_blocks > 0
        call.cancel()
        await until(lambda: server.engine.engine.used_blocks == 0)
    assert forward.calls < 100


async def test_abort_ends_a_stream_as_aborted(inference, control, server, controlled):
    with controlled(server) as forward:
        forward.seconds = 0.01
        call = inference.GenerateStream(asked(tokens=400, request_id="mine"))
        await call.read()
        await control.Abort(control_pb.AbortRequest(request_ids=["mine", "never seen"]))
        while (response := await call.read()) is not grpc.aio.EOF:
            last = response
    assert last.outputs.finish_info.finish_reason == Finish.ABORTED
    assert await control.Abort(control_pb.AbortRequest()) == control_pb.AbortResponse()


async def test_control_tells_of_server_and_model(control, server):
    info = await control.GetServerInfo(control_pb.GetServerInfoRequest())
    assert (info.api_version, info.max_model_len, info.kv_block_size) == ("vllm", 512, 16)
    assert info.total_kv_blocks == server.engine.engine.backend.num_blocks
    assert info.parallelism.world_size == 1
    assert info.instance_id
    model = await control.GetModelInfo(control_pb.GetModelInfoRequest())
    assert model.served_model_name == server.engine.engine.metrics.model_name
    assert (model.supports_text_input, model.supports_token_ids_input) == (True, True)
    assert {model.supports_lora, model.supports_multimodal} == {False}


async def test_what_control_does_not_serve_says_what_it_has(channel, details_of):
    for method in ("Sleep", "LoadLora"):
        call = channel.unary_unary(f"/vllm.Control/{method}")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"")
        assert refused.value.code() is UNIMPLEMENTED
        assert f"vllm.Control/{method} is not served here" in refused.value.details()
        assert "GetServerInfo, GetModelInfo, Abort" in refused.value.details()
        assert details_of(refused.value)["ErrorInfo"].reason == "NOT_BUILT_YET"


async def test_health_knows_the_adapters_services(channel):
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "vllm.Inference", "vllm.Control"):
        status = (await health.Check(health_pb2.HealthCheckRequest(service=service))).status
        assert status == health_pb2.HealthCheckResponse.SERVING
