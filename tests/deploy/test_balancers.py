"""Envoy, nginx and HAProxy as shipped, one client connection, two workers: who gets what, and what a lost worker costs."""

import asyncio
import json
import signal
import subprocess
import time
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest

from sparserve.client import make_request
from sparserve.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc

BALANCERS = ("envoy", "nginx", "haproxy")
STREAMS = 8


@asynccontextmanager
async def two_servers(serving, **settings):
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(serving(**settings)) for _ in range(2)]


class At:
    """Ports of a server in this process."""

    def __init__(self, server):
        self.grpc, self.http = server.port, server.metrics_port


def finished(server) -> float:
    """Streams that this server served to their end."""
    return server.engine.engine.metrics.registry.get_sample_value(
        "sparserve_requests_finished_total", {"reason": "length"}
    )


async def answered(channel, seconds: float = 30.0) -> None:
    """Until the balancer has found its workers."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    give_up = time.monotonic() + seconds
    while True:
        try:
            await stub.Generate(make_request("hello", max_tokens=1), timeout=5)
            return
        except grpc.aio.AioRpcError:
            assert time.monotonic() < give_up, "the balancer lets nothing through"
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("name", BALANCERS)
def test_the_program_itself_finds_no_fault_with_its_configuration(name, program, shipped):
    config, *check = shipped(name)
    command = [part.format(program=program(name), config=config) for part in check]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "warn" not in told.lower(), told


@pytest.mark.parametrize("name", BALANCERS)
async def test_the_streams_of_one_connection_are_split_and_operators_calls_kept_out(
    name, serving, balancer, channel, stream
):
    async with two_servers(serving) as servers:
        port = await balancer(name, [At(server) for server in servers])
        one = channel(f"127.0.0.1:{port}")
        await answered(one)
        await asyncio.sleep(1.2)  # Envoy: until both workers were asked for their health
        before = [finished(server) for server in servers]
        left = iter(range(2 * STREAMS))
        outcome = await stream(one, STREAMS, lambda: next(left, None) is None, tokens=30)
        assert outcome.lost == outcome.cut == []
        after = [finished(server) for server in servers]
        shares = [b - a for a, b in zip(before, after, strict=True)]
        assert sum(shares) == outcome.finished
        assert min(shares) >= 1, shares
        control = control_pb2_grpc.ControlServiceStub(one)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await control.GetLoad(control_pb2.GetLoadRequest(), timeout=10)
        assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED


# A client's own retries, for what had not begun; see docs/deploy.md.
RETRIES = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ]
}
# nginx cannot send again what it sent to a worker that died then.
NEEDS_RETRIES = ("nginx",)


async def through_each(balancer, channel, program, workers) -> dict:
    """name -> a channel through that balancer, for all that are installed."""
    channels = {}
    for name in BALANCERS:
        try:
            program(name)
        except pytest.skip.Exception:
            continue
        port = await balancer(name, [worker.ports for worker in workers])
        config = RETRIES if name in NEEDS_RETRIES else {}
        options = ("grpc.service_config", json.dumps(config))
        channels[name] = channel(f"127.0.0.1:{port}", options)
    if not channels:
        pytest.skip("no balancer is installed")
    await asyncio.gather(*(answered(one) for one in channels.values()))
    await asyncio.sleep(1.2)  # until they have asked both workers for their health
    return channels


async def under_load(channels, stream, seconds: float, what) -> dict:
    """name -> outcome of STREAMS streams at a time through each; `what()` is awaited meanwhile."""
    end = time.monotonic() + seconds

    async def act() -> None:
        await asyncio.sleep(seconds / 4)
        await what()

    *outcomes, _ = await asyncio.gather(
        *(stream(c, STREAMS, lambda: time.monotonic() > end, 100) for c in channels.values()),
        act(),
    )
    return dict(zip(channels, outcomes, strict=True))


async def test_a_killed_worker_costs_only_what_had_begun_and_comes_back(
    balancer, channel, program, workers, stream
):
    first, second = workers
    for worker in workers:
        await worker.ready()
    channels = await through_each(balancer, channel, program, workers)

    async def kill() -> None:
        first.kill()

    outcomes = await under_load(channels, stream, 4.0, kill)
    first.start()
    for name, outcome in outcomes.items():
        assert (name, outcome.lost, outcome.hung) == (name, [], 0)
        assert outcome.finished >= 1
    cut = [status for outcome in outcomes.values() for status in outcome.cut]
    assert cut, "the kill hit no stream"
    await first.ready()
    second.kill()  # so that nobody but the one that is back can answer
    try:
        await asyncio.gather(*(answered(one) for one in channels.values()))
    finally:
        second.start()


async def test_a_drained_worker_costs_nothing(balancer, channel, program, workers, stream):
    first, _ = workers
    for worker in workers:
        await worker.ready()
    channels = await through_each(balancer, channel, program, workers)

    async def drain() -> None:
        first.signal(signal.SIGTERM)
        assert await first.ended() == 0

    outcomes = await under_load(channels, stream, 5.0, drain)
    for name, outcome in outcomes.items():
        assert (name, outcome.lost, outcome.cut, outcome.hung) == (name, [], [], 0)
        assert outcome.finished >= 1
