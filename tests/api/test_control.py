"""ControlService: what the server says of itself."""

import asyncio
import time

import sparserve
from sparserve.client import make_request
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
    assert info.backend == pb.Backend(name="reference", device="cpu", dtype="float32", threads=1)
    limits = info.limits
    assert (limits.max_context_length, limits.default_max_tokens) == (128, 9)
    assert (limits.max_running_requests, limits.max_waiting_requests) == (3, 5)
    assert (limits.max_batched_tokens, limits.max_message_bytes) == (77, 2 << 20)
    assert limits.kv_block_size == 16
    assert limits.num_kv_blocks >= 128 // 16
    assert list(info.policies) == [inference_pb2.SPARSITY_POLICY_DENSE]
    assert info.default_policy == inference_pb2.SPARSITY_POLICY_DENSE


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
