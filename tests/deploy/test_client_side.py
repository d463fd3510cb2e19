"""No balancer: one channel that knows all servers, and connections that are renewed so that it finds new ones."""

import asyncio
import contextlib
import itertools
import json
import time
from contextlib import asynccontextmanager

import grpc
import pytest

from sparserve.client import AsyncClient, make_request
from sparserve.v1 import inference_pb2_grpc

ROUND_ROBIN = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        # A server that says NOT_SERVING gets no new requests, before it closes its port.
        "healthCheckConfig": {"serviceName": "sparserve.v1.InferenceService"},
    }
)


def answers(server) -> float:
    return sum(
        server.engine.engine.metrics.registry.get_sample_value(
            "sparserve_requests_finished_total", {"reason": reason}
        )
        for reason in ("length", "stop_eos")
    )


def target(*servers) -> str:
    return "ipv4:" + ",".join(f"127.0.0.1:{server.port}" for server in servers)


async def test_round_robin_splits_and_a_drain_costs_no_request(serving, stream, channel):
    async with serving() as first, serving(drain_delay=0.5) as second:
        one = channel(target(first, second), ("grpc.service_config", ROUND_ROBIN))
        ended = asyncio.Event()
        load = asyncio.ensure_future(stream(one, 8, ended.is_set, 30))
        await asyncio.sleep(0.7)
        assert min(answers(first), answers(second)) >= 1
        await second.drain_and_stop()
        await asyncio.sleep(0.3)
        ended.set()
        outcome = await load
        assert (outcome.lost, outcome.cut, outcome.hung) == ([], [], 0)
        assert outcome.finished == answers(first) + answers(second)


async def test_the_python_client_takes_several_addresses(serving):
    async with (
        serving() as first,
        serving() as second,
        AsyncClient(
            target(first, second), options={"grpc.service_config": ROUND_ROBIN}
        ) as client,
    ):  # fmt: skip
        await client.generate("hello", max_tokens=1)
        await asyncio.sleep(0.2)  # until both are connected
        for _ in range(6):
            await client.generate("hello", max_tokens=1)
        assert min(answers(first), answers(second)) >= 2


@asynccontextmanager
async def connection_balancer(servers):
    """-> its port. Each new connection goes to the next of `servers`: what a Kubernetes ClusterIP does."""
    turns, tasks = itertools.count(), set()

    async def copy(reader, writer):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader, writer):
        server = servers[next(turns) % len(servers)]
        upstream = await asyncio.open_connection("127.0.0.1", server.port)
        for source, to in ((reader, upstream[1]), (upstream[0], writer)):
            task = asyncio.ensure_future(copy(source, to))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    yield listening.sockets[0].getsockname()[1]
    listening.close()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("age", [0, 0.4])
async def test_connections_that_are_renewed_reach_a_server_that_was_added(serving, stream, age):
    """Without an age one channel stays with one server, whatever is added."""
    async with serving(max_connection_age=age) as first, serving(max_connection_age=age) as added:
        servers = [first]
        async with connection_balancer(servers) as port:
            one = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
            inference = inference_pb2_grpc.InferenceServiceStub(one)
            await inference.Generate(make_request("hello", max_tokens=1))
            servers.append(added)
            end = time.monotonic() + 1.5
            outcome = await stream(one, 4, lambda: time.monotonic() > end, 30)
            await one.close()
        assert (outcome.lost, outcome.cut, outcome.hung) == ([], [], 0)
        assert answers(first) > 1
        assert (answers(added) > 0) == (age > 0)
