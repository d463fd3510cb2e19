"""Long calls of careful clients are not cut."""

import asyncio
import time

import grpc

from sparserve.client import make_request
from sparserve.protocols import vllm_inference_pb2, vllm_inference_pb2_grpc


async def test_a_client_that_pings_every_second_is_not_cut_off_in_a_long_call(
    serving, connect, controlled
):
    """With gRPC's defaults such unary calls end in UNAVAILABLE, "Too many pings"."""
    pings = (
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )
    fields = {"max_tokens": 36, "temperature": 0, "ignore_eos": True}
    stopping = vllm_inference_pb2.StoppingCriteria(max_new_tokens=36, ignore_eos=True)
    adapted = vllm_inference_pb2.GenerateRequest(text="hello", stopping=stopping)
    async with (
        serving(adapters="vllm-inference", adapters_port=0) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.adapters_port}", options=pings) as channel,
    ):
        wire = connect(server, *pings)
        adapter = vllm_inference_pb2_grpc.InferenceStub(channel)
        with controlled(server) as forward:
            forward.seconds = 0.25
            begun = time.monotonic()
            own, others = await asyncio.gather(
                wire.inference.Generate(make_request("hello", **fields)), adapter.Generate(adapted)
            )
            assert time.monotonic() - begun > 9
        assert own.usage.completion_tokens == others.outputs.num_tokens == 36
        again = await wire.inference.Generate(make_request("hello", max_tokens=1))
        assert again.usage.completion_tokens == 1


async def test_a_connection_is_asked_to_reconnect_at_its_maximum_age_and_no_call_is_cut(
    serving, connect, controlled
):
    async with serving(max_connection_age=0.3) as server:
        wire = connect(server)
        await wire.channel.channel_ready()
        with controlled(server) as forward:
            forward.seconds = 0.05
            long = await wire.inference.Generate(
                make_request("hello", max_tokens=20, temperature=0, ignore_eos=True)
            )
        assert long.usage.completion_tokens == 20  # a second, three times the age
        ready = grpc.ChannelConnectivity.READY
        await asyncio.wait_for(wire.channel.wait_for_state_change(ready), 30)
        again = await wire.inference.Generate(make_request("hello", max_tokens=1))
        assert again.usage.completion_tokens == 1
