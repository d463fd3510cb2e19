"""Long calls of careful clients are not cut."""

import asyncio
import time

import grpc

from sparserve.client import make_request


async def test_a_client_that_pings_every_second_is_not_cut_off_in_a_long_call(
    server, connect, controlled
):
    """With gRPC's defaults such a unary call ends in UNAVAILABLE, "Too many pings"."""
    wire = connect(
        server,
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )
    with controlled(server) as forward:
        forward.seconds = 0.25
        begun = time.monotonic()
        response = await wire.inference.Generate(
            make_request("hello", max_tokens=24, temperature=0, ignore_eos=True)
        )
        assert time.monotonic() - begun > 5.5
    assert response.usage.completion_tokens == 24
    forward.seconds = 0
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
