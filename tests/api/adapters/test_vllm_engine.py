"""`vllm.grpc.engine.VllmEngine`, called over its own stubs."""

import asyncio
import hashlib
import importlib
import io
import json
import re
import sys
import zipfile

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import common_pb2

from sparserve.client import AsyncClient
from sparserve.errors import ConfigError
from sparserve.model.backend import BLOCK_SIZE

# "hello, world" to the tiny tokenizer
HELLO = (71, 68, 75, 75, 78, 11, 220, 86, 78, 81, 75, 67)


async def test_ids_and_text_give_the_tokens_of_our_own_api(peer):
    async with AsyncClient(f"127.0.0.1:{peer.server.port}") as client:
        own = await client.generate(
            "hello, world", temperature=0.0, ignore_eos=True, max_tokens=8, token_ids=True
        )
    answer = await peer.complete()
    assert list(answer.output_ids) == list(own.token_ids)
    assert (answer.finish_reason, answer.index) == ("length", 0)
    assert (answer.prompt_tokens, answer.completion_tokens) == (12, 8)
    text = peer.request_of()
    text.text = "hello, world"
    (from_text,) = await peer.generate(text)
    assert from_text.output_ids == answer.output_ids


async def test_a_stream_has_each_token_once_and_then_all_for_each_choice(peer):
    whole = await peer.generate(peer.request_of(n=2, temperature=1.0, seed=7))
    answers = await peer.generate(peer.request_of(n=2, temperature=1.0, seed=7, stream=True))
    for index in (0, 1):
        own = [answer for answer in answers if answer.index == index]
        *chunks, complete = own
        assert isinstance(complete, pb.GenerateComplete)
        ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
        assert sum(chunk.completion_tokens for chunk in chunks) == len(ids) == 8
        assert all(chunk.prompt_tokens == 12 for chunk in chunks)
        assert ids == list(complete.output_ids)
        (same,) = (answer for answer in whole if answer.index == index)
        assert same.output_ids == complete.output_ids
    assert len({tuple(answer.output_ids) for answer in whole}) == 2


async def test_log_probabilities_of_output_and_prompt(peer):
    async with AsyncClient(f"127.0.0.1:{peer.server.port}") as client:
        own = await client.generate(
            "hello, world", temperature=0.0, ignore_eos=True, max_tokens=3, top_logprobs=2,
            prompt_logprobs=1,
        )  # fmt: skip
    asked = {"max_tokens": 3, "logprobs": 2, "prompt_logprobs": 1}
    answer = await peer.complete(**asked)
    told = answer.output_logprobs
    assert list(told.token_ids) == list(answer.output_ids)
    assert list(told.token_logprobs) == pytest.approx([t.logprob for t in own.choices[0].tokens])
    assert [list(top.token_ids) for top in told.top_logprobs] == [
        [top.id for top in token.top] for token in own.choices[0].tokens
    ]
    prompt = answer.input_logprobs
    assert list(prompt.token_ids) == list(HELLO)
    assert not prompt.token_logprobs[0].HasField("value")
    assert [one.value for one in prompt.token_logprobs[1:]] == pytest.approx(
        [token.logprob for token in own.prompt[1:]]
    )
    first, *later, complete = await peer.generate(peer.request_of(stream=True, **asked))
    assert first.input_logprobs == prompt
    assert not any(chunk.HasField("input_logprobs") for chunk in later)
    streamed = [
        value for chunk in (first, *later) for value in chunk.output_logprobs.token_logprobs
    ]
    assert streamed == list(told.token_logprobs)
    assert not complete.HasField("output_logprobs")


async def test_what_stopped_a_choice_is_named(peer):
    free = await peer.complete()
    second = free.output_ids[1]
    by_id = await peer.complete(stop_token_ids=[second])
    assert (by_id.finish_reason, by_id.matched_token_id) == ("stop", second)
    assert list(by_id.output_ids) == list(free.output_ids[:2])
    text = peer.server.engine.engine.tokenizer.token_text
    by_text = await peer.complete(stop=[text(free.output_ids[0]) + text(second)])
    assert by_text.finish_reason == "stop"
    assert by_text.matched_stop_str == text(free.output_ids[0]) + text(second)


async def test_bias_penalties_and_truncation_reach_the_engine(peer):
    assert set((await peer.complete(logit_bias={65: 100.0})).output_ids) == {65}
    plain = await peer.complete(max_tokens=24)
    penalized = await peer.complete(max_tokens=24, frequency_penalty=2.0, presence_penalty=2.0)
    assert len(set(penalized.output_ids)) > len(set(plain.output_ids))
    cut = await peer.complete(truncate_prompt_tokens=5)
    assert cut.prompt_tokens == 5
    assert cut.output_ids == (await peer.complete(ids=HELLO[-5:])).output_ids


CONSTRAINTS = (
    ({"regex": "[0-9]{3}"}, "[0-9]{3}"),
    ({"grammar": 'root ::= "a" "b"+ "c"'}, "ab+c"),
    ({"choice": pb.ChoiceConstraint(choices=["yes", "no"])}, "yes|no"),
    ({"json_schema": json.dumps({"enum": [12, True]})}, r"\s*(12|true)\s*"),
    ({"json_object": True, "max_tokens": 200}, r"(?s)\s*\{.*"),
)


async def test_a_constraint_shapes_the_text(peer):
    """All on one server: the first takes seconds."""
    for constraint, pattern in CONSTRAINTS:
        answer = await peer.complete(**{"ignore_eos": False, "max_tokens": 40, **constraint})
        text = peer.server.engine.engine.tokenizer.decode(answer.output_ids)
        assert re.fullmatch(pattern, text), text


REFUSED = {
    "structural_tag": ({"structural_tag": "{}"}, {}, "sampling_params.structural_tag"),
    "all logprobs": ({"logprobs": -1}, {}, "sampling_params.logprobs"),
    "prompt logprobs": ({"prompt_logprobs": 65}, {}, "sampling_params.prompt_logprobs"),
    "negative bias": ({"logit_bias": {-1: 1.0}}, {}, "sampling_params.logit_bias[-1]"),
    "truncation": ({"truncate_prompt_tokens": -1}, {}, "sampling_params.truncate_prompt_tokens"),
    "top_p": ({"top_p": 2.0}, {}, "sampling_params.top_p"),
    "n": ({"n": 1000}, {}, "sampling_params.n"),
    "schema": ({"json_schema": "{"}, {}, "sampling_params.json_schema"),
    "no object": ({"json_object": False}, {}, "sampling_params.json_object"),
    "no choices": ({"choice": pb.ChoiceConstraint()}, {}, "sampling_params.choice"),
    "images": ({}, {"mm_inputs": pb.MultimodalInputs()}, "mm_inputs"),
    "more images": ({}, {"extra_mm_inputs": [pb.MultimodalInputs()]}, "extra_mm_inputs"),
    "references": ({}, {"media_refs": pb.MediaRefs()}, "media_refs"),
    "transfer": ({}, {"kv_transfer_params_json": "{}"}, "kv_transfer_params_json"),
    "old transfer": ({}, {"kv_transfer_params": pb.KvTransferParams()}, "kv_transfer_params"),
    "rank": ({}, {"data_parallel_rank": 1}, "data_parallel_rank"),
    "no such id": ({}, {"tokenized": pb.TokenizedInput(input_ids=[2**31])}, "tokenized.input_ids"),
    "no token": ({}, {"tokenized": pb.TokenizedInput()}, "tokenized.input_ids"),
    "too long": ({}, {"tokenized": pb.TokenizedInput(input_ids=[1] * 512)}, "tokenized.input_ids"),
    "stop token": ({"stop_token_ids": [300]}, {}, "sampling_params.stop_token_ids[0]"),
}


@pytest.mark.parametrize(("params", "fields", "name"), REFUSED.values(), ids=REFUSED)
async def test_what_cannot_be_done_is_refused_by_its_name(peer, details_of, params, fields, name):
    request = peer.request_of(**params)
    request.MergeFrom(pb.GenerateRequest(**fields))
    if "tokenized" in fields:
        request.tokenized.CopyFrom(fields["tokenized"])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await peer.generate(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = details_of(refused.value)["BadRequest"].field_violations
    assert violation.field == name


async def test_without_input_nothing_is_generated(peer):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await peer.generate(pb.GenerateRequest())
    assert "set tokenized or text" in refused.value.details()


@pytest.mark.parametrize("way", ["Abort", "cancel", "deadline"])
async def test_who_leaves_frees_its_blocks_before_the_next_step(peer, controlled, until, way):
    engine = peer.server.engine.engine
    with controlled(peer.server) as forward:
        # A step takes so long that the deadline passes in the middle.
        forward.seconds = 0.02
        timeout = 0.5 if way == "deadline" else None
        call = peer.stub.Generate(
            peer.request_of(max_tokens=400, stream=True, request_id="long"), timeout=timeout
        )
        answers = aiter(call)
        await anext(answers)
        assert engine.used_blocks > 0
        if way == "Abort":
            await peer.stub.Abort(pb.AbortRequest(request_ids=["long", "unknown"]))
            last = [answer async for answer in answers][-1]
            assert last.complete.finish_reason == "abort"
        elif way == "cancel":
            call.cancel()
        else:
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                async for _ in answers:
                    pass
            assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: engine.used_blocks == 0, "all blocks are free")
        await until(lambda: peer.server.engine.in_flight == 0)
        calls = forward.calls
        await asyncio.sleep(0.1)
        assert forward.calls == calls


async def test_info_tells_the_model_the_limits_and_the_load(peers, controlled, tiny_folder, until):
    peer = await peers(max_running=2, max_context=128)
    model = await peer.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert model == pb.GetModelInfoResponse(
        model_path=tiny_folder.name,
        served_model_name=tiny_folder.name,
        is_generation=True,
        max_context_length=128,
        max_req_input_len=127,
        vocab_size=259,
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        eos_token_ids=[257],
        bos_token_id=256,
    )
    info = await peer.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (info.max_num_seqs, info.block_size, info.is_paused) == (2, BLOCK_SIZE, False)
    with controlled(peer.server) as forward:
        forward.hold()
        calls = [peer.stub.Generate(peer.request_of(stream=True)) for _ in range(3)]
        await until(lambda: peer.server.engine.in_flight == 3)
        forward.allow_one()  # of the first alone; the next has two
        await until(lambda: peer.server.engine.engine.num_running == 2)
        await until(lambda: peer.server.engine.engine.num_waiting == 1)
        (load,) = (await peer.stub.GetLoads(pb.GetLoadsRequest())).loads
        assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (2, 1, 3)
        assert (load.max_running_requests, load.utilization) == (2, 1.0)
        assert 0 < load.token_usage < 1
        assert (
            load.max_total_num_tokens == peer.server.engine.engine.backend.num_blocks * BLOCK_SIZE
        )
        for call in calls:
            call.cancel()
        forward.release()


async def test_a_draining_server_says_so_and_refuses(peer):
    health = health_pb2_grpc.HealthStub(peer.channel)
    asked = health_pb2.HealthCheckRequest(service="vllm.grpc.engine.VllmEngine")
    assert (await peer.stub.HealthCheck(pb.HealthCheckRequest())).healthy
    assert (await health.Check(asked)).status == health_pb2.HealthCheckResponse.SERVING
    watch = peer.stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest())
    await watch.read()
    await peer.server.engine.drain(1)
    told = await peer.stub.HealthCheck(pb.HealthCheckRequest())
    assert (told.healthy, told.message) == (False, "the server is draining")
    assert (await health.Check(asked)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    for call in (peer.stub.Generate(peer.request_of()), watch):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_the_tokenizer_comes_as_a_zip_with_its_checksum_last(peer):
    chunks = [c async for c in peer.stub.GetTokenizer(common_pb2.GetTokenizerRequest())]
    data = b"".join(chunk.data for chunk in chunks)
    assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = {"config.json", "tokenizer.json", "tokenizer_config.json"}
        assert set(archive.namelist()) == names


@pytest.mark.parametrize(
    ("method", "request_type"),
    [
        ("Embed", pb.EmbedRequest),
        ("StartProfile", common_pb2.StartProfileRequest),
        ("StopProfile", common_pb2.StopProfileRequest),
    ],
)
async def test_what_is_not_served_says_so(peer, method, request_type):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await getattr(peer.stub, method)(request_type())
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert refused.value.details()


def test_without_the_stubs_the_way_to_them_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("sparserve.api.adapters.vllm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "smg_grpc_proto", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'sparserve[gateway]'")):
        importlib.import_module("sparserve.api.adapters.vllm_engine")
