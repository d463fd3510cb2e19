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
        left = iter(range(16))
        outcome = await stream(one, 8, lambda: next(left, None) is None, tokens=30)
        assert outcome.lost == outcome.cut == []
        after = [finished(server) for server in servers]
        shares = [b - a for a, b in zip(before, after, strict=True)]
        assert sum(shares) == outcome.finished
        assert min(shares) >= 1, shares
        control = control_pb2_grpc.ControlServiceStub(one)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await control.Abort(control_pb2.AbortRequest(request_ids=["a"]), timeout=10)
        assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_envoy_asks_another_worker_where_one_is_full(serving, balancer, channel, stream):
    async with serving(max_running=1, max_waiting=0) as small, serving() as large:
        port = await balancer("envoy", [At(small), At(large)])
        one = channel(f"127.0.0.1:{port}")
        await answered(one)
        await asyncio.sleep(1.2)  # until both workers were asked for their health
        left = iter(range(32))
        outcome = await stream(one, 8, lambda: next(left, None) is None, tokens=100)
        assert (outcome.finished, outcome.lost, outcome.cut) == (32, [], [])
        assert min(finished(small), finished(large)) >= 1
        rejected = small.engine.engine.metrics.requests_rejected.labels(reason="queue_full")
        assert rejected._value.get() >= 1


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
STREAMS = 8
ROUNDS = 6


async def answered(channel) -> None:
    """Until the balancer has found its workers."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    give_up = time.monotonic() + 60
    while True:
        try:
            await stub.Generate(make_request("hello", max_tokens=1), timeout=5)
            return
        except grpc.aio.AioRpcError:
            assert time.monotonic() < give_up, "the balancer lets nothing through"
            await asyncio.sleep(0.05)


@pytest.fixture
def through_each(balancer, channel, installed):
    """`await through_each(workers)` -> a channel through each balancer that is installed, by its name."""

    async def connect(workers):
        names = [name for name in BALANCERS if installed(name)]
        if not names:
            pytest.skip(f"none of {', '.join(BALANCERS)} is installed")
        for worker in workers:
            await worker.ready()
        channels = {}
        for name in names:
            port = await balancer(name, [worker.ports for worker in workers])
            config = RETRIES if name in NEEDS_RETRIES else {}
            options = ("grpc.service_config", json.dumps(config))
            channels[name] = channel(f"127.0.0.1:{port}", options)
        await asyncio.gather(*(answered(one) for one in channels.values()))
        await asyncio.sleep(1.2)  # until they have asked all workers for their health
        return channels

    return connect


@pytest.fixture
def under_load(stream):
    """`await under_load(channels, seconds, act)` -> what became of the STREAMS streams at a time through each, by its
    name, while `act` was awaited once.
    """

    async def load(channels, seconds, act):
        end = time.monotonic() + seconds

        async def later() -> None:
            await asyncio.sleep(seconds / 4)
            await act()

        streams = (
            stream(c, STREAMS, lambda: time.monotonic() > end, 100) for c in channels.values()
        )
        *outcomes, _ = await asyncio.gather(*streams, later())
        return dict(zip(channels, outcomes, strict=True))

    return load


async def test_a_killed_worker_costs_only_what_had_begun_and_comes_back(
    through_each, under_load, workers
):
    first, second = workers
    channels = await through_each(workers)

    async def kill() -> None:
        first.kill()

    outcomes = await under_load(channels, 4.0, kill)
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


async def test_a_drained_worker_costs_nothing(through_each, under_load, workers):
    first, _ = workers
    channels = await through_each(workers)

    async def drain() -> None:
        first.signal(signal.SIGTERM)
        assert await first.ended() == 0

    outcomes = await under_load(channels, 5.0, drain)
    first.start()
    for name, outcome in outcomes.items():
        assert (name, outcome.lost, outcome.cut, outcome.hung) == (name, [], [], 0)
        assert outcome.finished >= 1


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_workers_killed_and_drained_by_turns_cost_only_what_a_kill_had_begun(
    through_each, under_load, workers
):
    channels = await through_each(workers)
    total = dict.fromkeys(channels, (0, []))
    for turn in range(2 * ROUNDS):
        worker, killed = workers[turn % 2], turn % 4 < 2

        async def end(worker=worker, killed=killed) -> None:
            if killed:
                worker.kill()
            else:
                worker.signal(signal.SIGTERM)
                assert await worker.ended() == 0
            await asyncio.sleep(1)
            worker.start()
            await worker.ready()

        outcomes = await under_load(channels, 6.0, end)
        for name, outcome in outcomes.items():
            assert (turn, name, outcome.lost, outcome.hung) == (turn, name, [], 0)
            assert killed or outcome.cut == []
            finished, cut = total[name]
            total[name] = (finished + outcome.finished, cut + outcome.cut)
        await asyncio.sleep(3)  # until the balancers use it again
    for name, (finished, cut) in total.items():
        codes = sorted({status.split(":")[0] for status in cut})
        print(f"{name}: {finished} finished, {len(cut)} cut by {ROUNDS} kills ({codes}), none lost")
