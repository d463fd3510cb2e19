"""Bounds of a connection: its age, its calls at once, the metadata of a call."""

import asyncio
import time

import grpc
import pytest

from sparserve.api.server import addresses
from sparserve.client import AsyncClient, make_request
from sparserve.config import ServerSettings
from sparserve.errors import CallFailed
from sparserve.v1 import control_pb2 as pb

ENDLESS = {"max_tokens": 500, "ignore_eos": True, "temperature": 0}


async def test_metadata_beyond_the_limit_is_refused_and_below_it_is_not(serving, connect):
    async with serving(max_metadata_kib=4) as server:
        wire = connect(server)
        await wire.control.ListModels(pb.ListModelsRequest(), metadata=[("x", "y" * 3000)])
        for _ in range(5):  # never by chance
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await wire.control.ListModels(pb.ListModelsRequest(), metadata=[("x", "y" * 4096)])
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_more_calls_than_a_connection_may_have_wait(serving, connect, controlled, until):
    async with serving(max_concurrent_streams=2) as server:
        wire, other = connect(server), connect(server)
        with controlled(server) as forward:
            forward.hold()
            calls = [
                asyncio.ensure_future(wire.inference.Generate(make_request("x", max_tokens=1)))
                for _ in range(3)
            ]
            await until(lambda: server.engine.in_flight == 2)
            await other.control.ListModels(pb.ListModelsRequest())
            await asyncio.sleep(0.1)
            assert server.engine.in_flight == 2
        await asyncio.gather(*calls)


@pytest.mark.parametrize("grace", [0, 0.3])
async def test_an_old_connection_is_left_by_new_calls_and_its_own_end_by_the_grace(
    serving, controlled, grace
):
    ages = {"max_connection_age": 0.3, "max_connection_grace": grace}
    async with serving(**ages) as server:
        with controlled(server) as forward:
            forward.seconds = 0.01
            async with AsyncClient(f"127.0.0.1:{server.port}") as client:
                begun = time.monotonic()
                pieces = client.stream("hello", **{**ENDLESS, "max_tokens": 150})
                read = asyncio.ensure_future(_last(pieces))
                await asyncio.sleep(0.5)
                assert await client.list_models()  # on a new connection
                if not grace:
                    assert (await read).result.completion_tokens == 150
                    return
                with pytest.raises(CallFailed) as ended:
                    await read
                assert ended.value.code == "UNAVAILABLE"
                assert 0.5 < time.monotonic() - begun < 1.5


async def _last(pieces):
    return [piece async for piece in pieces][-1]


def test_metrics_may_have_an_address_of_their_own():
    settings = ServerSettings(host="0.0.0.0", metrics_host="127.0.0.1")
    assert [each.host for each in addresses(settings)] == ["0.0.0.0", "127.0.0.1"]
    assert [each.host for each in addresses(ServerSettings(host="::"))] == ["::", "::"]
