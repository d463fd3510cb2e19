"""ControlService: what the server says of itself."""

import asyncio
import hashlib
import math
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2
from transformers import AutoTokenizer

import sparserve
from sparse_kernels.device import describe
from sparse_kernels.native import cpu_features
from sparserve.client import AsyncClient, Client, make_request
from sparserve.client.responses import ArchiveReader
from sparserve.errors import CallFailed
from sparserve.v1 import control_pb2 as pb
from sparserve.v1 import inference_pb2


async def test_the_one_model_is_listed_under_its_folders_name(wire, tiny_folder):
    listed = await wire.control.ListModels(pb.ListModelsRequest())
    assert [model.name for model in listed.models] == [tiny_folder.name]


async def test_model_info_is_the_models_own(wire, tiny_folder):
    info = await wire.control.GetModelInfo(pb.GetModelInfoRequest())
    assert info.model == tiny_folder.name
    assert info.architecture == "LlamaForCausalLM"
    assert (info.num_layers, info.hidden_size, info.intermediate_size) == (2, 64, 96)
    assert (info.num_heads, info.num_kv_heads, info.head_dim) == (4, 2, 16)
    assert (info.vocab_size, info.max_context_length) == (259, 512)
    assert (list(info.eos_token_ids), info.bos_token_id) == ([257], 256)
    assert info.dtype == "float32"
    assert "messages" in info.chat_template
    # Two layers of q, k, v, o, gate, up, down and two norms; embedding, head, norm.
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
    assert info.num_parameters == 2 * layer + 2 * 259 * 64 + 64
    named = await wire.control.GetModelInfo(pb.GetModelInfoRequest(model=tiny_folder.name))
    assert named == info


@pytest.mark.parametrize(
    ("dtype", "told"), [("auto", "bfloat16"), ("int4", "int4 (attention g32, LM head int8)")]
)
async def test_server_info_names_instruction_set_and_formats_of_the_native_backend(
    serving, connect, tiny_bfloat16, dtype, told
):
    async with serving(model=tiny_bfloat16, backend="cpu", dtype=dtype) as server:
        info = await connect(server).control.GetServerInfo(pb.GetServerInfoRequest())
        model = await connect(server).control.GetModelInfo(pb.GetModelInfoRequest())
    assert info.backend == pb.Backend(
        name="cpu",
        device="cpu",
        dtype=told,
        threads=1,
        isa=cpu_features().isa,
        kv_dtype="bfloat16",
    )
    assert model.dtype == told


async def test_server_info_names_the_gpu(serving, connect, tiny_bfloat16, cuda):
    async with serving(model=tiny_bfloat16, backend="auto", device=cuda) as server:
        info = await connect(server).control.GetServerInfo(pb.GetServerInfoRequest())
    gpu = describe(cuda)
    assert info.backend == pb.Backend(
        name="cuda", device=f"cuda:0 {gpu.name}", dtype="bfloat16", threads=1, kv_dtype="bfloat16"
    )
    assert gpu.name


async def test_server_info_tells_backend_limits_and_policies(serving, connect):
    begun = time.time()
    settings = {
        "max_context": 128,
        "max_running": 3,
        "max_waiting": 5,
        "max_batched_tokens": 77,
        "default_max_tokens": 9,
        "max_message_mib": 2,
    }
    async with serving(**settings) as server:
        info = await connect(server).control.GetServerInfo(pb.GetServerInfoRequest())
    assert info.version == sparserve.__version__
    assert begun - 1 <= info.start_time.ToMicroseconds() / 1e6 <= time.time() + 1
    assert info.backend == pb.Backend(
        name="reference", device="cpu", dtype="float32", threads=1, kv_dtype="float32"
    )
    limits = info.limits
    assert (limits.max_context_length, limits.default_max_tokens) == (128, 9)
    assert (limits.max_running_requests, limits.max_waiting_requests) == (3, 5)
    assert (limits.max_batched_tokens, limits.max_message_bytes) == (77, 2 << 20)
    assert limits.kv_block_size == 16
    assert limits.num_kv_blocks >= 128 // 16
    assert list(info.policies) == [
        inference_pb2.SPARSITY_POLICY_DENSE,
        inference_pb2.SPARSITY_POLICY_CORE,
        inference_pb2.SPARSITY_POLICY_EXACT,
    ]
    assert info.default_policy == inference_pb2.SPARSITY_POLICY_DENSE
    assert info.sparsity == pb.SparsityBounds()


async def test_server_info_tells_what_policies_may_ask_for(serving, connect, tiny_index):
    settings = {
        "index": str(tiny_index), "default_policy": "auto", "min_density": 0.25, "max_target_kl": 0.5,
        "allowed_policies": "auto,token",
    }  # fmt: skip
    async with serving(**settings) as server:
        info = await connect(server).control.GetServerInfo(pb.GetServerInfoRequest())
    assert list(info.policies) == [
        inference_pb2.SPARSITY_POLICY_DENSE,
        inference_pb2.SPARSITY_POLICY_TOKEN,
        inference_pb2.SPARSITY_POLICY_AUTO,
    ]
    assert info.default_policy == inference_pb2.SPARSITY_POLICY_AUTO
    assert info.sparsity == pb.SparsityBounds(min_density=0.25, max_target_kl=0.5, has_index=True)


async def test_load_counts_requests_tokens_and_blocks(serving, connect, controlled, until):
    requests = [
        make_request(letter * 40, max_tokens=2, temperature=0, ignore_eos=True)
        for letter in "abcde"
    ]
    async with serving(max_running=2) as server:
        wire = connect(server)

        async def load() -> pb.GetLoadResponse:
            return await wire.control.GetLoad(pb.GetLoadRequest())

        total = server.engine.engine.backend.num_blocks
        with controlled(server) as forward:
            forward.hold()
            calls = [asyncio.ensure_future(wire.inference.Generate(requests[0]))]
            await until(lambda: forward.calls == 1)
            # 40 tokens of prompt and one more are three blocks of 16.
            assert await load() == pb.GetLoadResponse(
                running_requests=1, waiting_tokens=40, used_kv_blocks=3, num_kv_blocks=total
            )
            calls += [asyncio.ensure_future(wire.inference.Generate(r)) for r in requests[1:]]
            await until(lambda: server.engine.in_flight == 5)
            forward.allow_one()
            await until(lambda: forward.calls == 2)
            # The first decodes, the second is in its prefill, three wait.
            assert await load() == pb.GetLoadResponse(
                running_requests=2,
                waiting_requests=3,
                waiting_tokens=4 * 40,
                used_kv_blocks=6,
                num_kv_blocks=total,
            )
        await asyncio.gather(*calls)
        # Two whole blocks of each prompt stay in the prefix cache.
        assert await load() == pb.GetLoadResponse(num_kv_blocks=total, cached_kv_blocks=10)


async def test_load_can_be_asked_at_any_moment_of_a_busy_server(wire, connect, server):
    control = connect(server).control
    calls = [
        asyncio.ensure_future(
            wire.inference.Generate(make_request("x" * (i % 90 + 1), max_tokens=4))
        )
        for i in range(80)
    ]
    asked = 0
    while not all(call.done() for call in calls):
        await control.GetLoad(pb.GetLoadRequest())
        asked += 1
    await asyncio.gather(*calls)
    assert asked > 10


async def parts_of(wire) -> list[pb.GetTokenizerResponse]:
    return [part async for part in wire.control.GetTokenizer(pb.GetTokenizerRequest())]


async def test_the_tokenizer_comes_in_parts_with_the_checksum_of_the_whole_on_the_last(
    serving, connect, demo_model
):
    async with serving(model=demo_model, max_context=64, kv_cache_gib=0.1) as server:
        wire = connect(server)
        parts, again = await parts_of(wire), await parts_of(wire)
    assert parts == again
    assert len(parts) > 5
    assert {len(part.data) for part in parts[:-1]} == {64 << 10}
    assert 0 < len(parts[-1].data) <= 64 << 10
    whole = b"".join(part.data for part in parts)
    assert [part.sha256 for part in parts[:-1]] == [""] * (len(parts) - 1)
    assert parts[-1].sha256 == hashlib.sha256(whole).hexdigest()


async def test_the_tokenizer_of_another_model_is_not_found(wire):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await wire.control.GetTokenizer(pb.GetTokenizerRequest(model="gpt-9")).read()
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_two_servers_of_a_model_send_the_same_bytes(serving, connect):
    archives = []
    for _ in range(2):
        async with serving() as server:
            archives.append(await parts_of(connect(server)))
    assert archives[0] == archives[1]


async def test_the_unzipped_tokenizer_is_loaded_by_transformers(
    serving, demo_model, tiny_model, tmp_path
):
    messages = [{"role": "user", "content": "Hi, Zürich 🎉"}]
    for model in (tiny_model, demo_model):
        folder = tmp_path / model.name
        folder.mkdir()
        async with (
            serving(model=model, max_context=64, kv_cache_gib=0.1) as server,
            AsyncClient(f"127.0.0.1:{server.port}") as client,
        ):
            for name, content in (await client.tokenizer_files()).items():
                assert "/" not in name
                (folder / name).write_bytes(content)
            made = await client.tokenize_chat(messages)
            plain = await client.tokenize("Hi, 12 Zürich 🎉 <|im_start|>")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == made.text
        assert tokenizer(text, add_special_tokens=False).input_ids == list(made.token_ids)
        assert tokenizer(plain.text).input_ids == list(plain.token_ids)
        assert tokenizer.bos_token_id == model.config.bos_token_id
        assert tokenizer.eos_token_id == model.config.eos_token_ids[0]
        assert tokenizer.decode(list(plain.token_ids), skip_special_tokens=False) == plain.text


async def test_an_archive_that_lost_a_part_is_noticed_by_the_client(wire):
    (part,) = await parts_of(wire)
    whole, cut = ArchiveReader(), ArchiveReader()
    whole.read(part)
    assert sorted(whole.files()) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    cut.read(pb.GetTokenizerResponse(data=part.data[:-1], sha256=part.sha256))
    with pytest.raises(CallFailed, match="DATA_LOSS"):
        cut.files()


async def test_a_drain_tells_how_many_are_left_and_ends_with_drained(
    serving, connect, controlled, until
):
    request = make_request("hello", max_tokens=3, temperature=0, ignore_eos=True)
    async with serving() as server:
        wire = connect(server)
        with controlled(server) as forward:
            forward.hold()
            calls = [asyncio.ensure_future(wire.inference.Generate(request)) for _ in range(2)]
            await until(lambda: server.engine.in_flight == 2)
            first = wire.control.Drain(pb.DrainRequest())
            second = wire.control.Drain(pb.DrainRequest(timeout_seconds=1000))
            for drain in (first, second):
                assert await drain.read() == pb.DrainResponse(requests_in_flight=2)
            assert not server.is_ready
            health = await wire.health.Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await wire.inference.Generate(request)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            begun = time.monotonic()
            assert await first.read() == pb.DrainResponse(requests_in_flight=2)
            assert time.monotonic() - begun > 0.5  # nothing changed: told again after a second
        for drain in (first, second):
            told = []
            while (response := await drain.read()) is not grpc.aio.EOF:
                told.append(response)
            assert told[-1] == pb.DrainResponse(drained=True)
            assert not any(response.drained for response in told[:-1])
        answers = await asyncio.gather(*calls)
        assert all(answer.usage.completion_tokens == 3 for answer in answers)
        again = [response async for response in wire.control.Drain(pb.DrainRequest())]
        assert again == [pb.DrainResponse(drained=True)]
        load = await wire.control.GetLoad(pb.GetLoadRequest())  # the process itself goes on
        assert load.running_requests == 0


async def test_a_drain_ends_what_its_timeout_finds_in_flight(serving, connect, controlled, until):
    request = make_request("hello", max_tokens=3)
    async with serving() as server:
        wire = connect(server)
        with controlled(server) as forward:
            forward.hold()
            call = asyncio.ensure_future(wire.inference.Generate(request))
            await until(lambda: server.engine.in_flight == 1)
            async with AsyncClient(f"127.0.0.1:{server.port}") as client:
                seen = []
                await client.drain(0.2, seen.append)
            assert seen[0] == 1
            assert seen[-1] == 0
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await call
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_the_plain_client_waits_for_a_drain(serving):
    async with serving() as server:

        def drain() -> list[int]:
            seen: list[int] = []
            with Client(f"127.0.0.1:{server.port}") as client:
                client.drain(on_progress=seen.append)
                with pytest.raises(CallFailed, match="UNAVAILABLE"):
                    client.generate("hello")
            return seen

        assert (await asyncio.to_thread(drain))[-1] == 0
        assert not server.is_ready


async def test_a_client_that_leaves_does_not_undo_its_drain(serving, connect, controlled, until):
    request = make_request("hello", max_tokens=3)
    async with serving() as server:
        wire = connect(server)
        with controlled(server) as forward:
            forward.hold()
            call = asyncio.ensure_future(wire.inference.Generate(request))
            await until(lambda: server.engine.in_flight == 1)
            drain = wire.control.Drain(pb.DrainRequest(timeout_seconds=0.4))
            await drain.read()
            drain.cancel()
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await call  # by the timeout of the drain that nobody listens to any more
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
            assert not server.is_ready


@pytest.mark.parametrize("timeout", [-0.1, 86400.5, math.nan, math.inf, -math.inf])
async def test_a_timeout_that_cannot_be_is_refused_and_drains_nothing(
    server, wire, details_of, timeout
):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await wire.control.Drain(pb.DrainRequest(timeout_seconds=timeout)).read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = details_of(refused.value)["BadRequest"].field_violations
    assert violation.field == "timeout_seconds"
    assert server.is_ready


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("LoadAdapter", pb.LoadAdapterRequest(name="a", path="b")),
        ("UnloadAdapter", pb.UnloadAdapterRequest(name="a")),
    ],
)
async def test_adapters_are_unimplemented(wire, method, request_):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await getattr(wire.control, method)(request_)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "LoRA adapters are not served" in refused.value.details()
