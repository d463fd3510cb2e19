"""grpc.health.v1, readiness over HTTP, and what a drain looks like from outside."""

import asyncio
import socket
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2

from sparserve.client import AsyncClient, make_request

SHORT = make_request("hi", max_tokens=3, temperature=0, ignore_eos=True)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ["", "sparserve.v1.InferenceService", "sparserve.v1.ControlService"]


def about(service: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


async def next_status(watch) -> int:
    return (await asyncio.wait_for(watch.read(), 30)).status


@pytest.mark.parametrize("service", SERVICES)
async def test_check_says_serving_for_the_server_and_each_service(wire, service):
    assert (await wire.health.Check(about(service))).status == SERVING


async def test_an_unknown_service_is_not_found_by_check_and_unknown_to_watch(wire):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await wire.health.Check(about("nope"))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    watch = wire.health.Watch(about("nope"))
    assert await next_status(watch) == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


@pytest.mark.parametrize("service", SERVICES)
async def test_watch_tells_of_a_drain_before_the_requests_in_flight_are_done(
    serving, connect, controlled, until, monkeypatch, service
):
    monkeypatch.setattr("sparserve.api.server._GRACE_SECONDS", 1000.0)
    async with serving(drain_delay=0.5) as server:
        wire = connect(server)
        watch = wire.health.Watch(about(service))
        assert await next_status(watch) == SERVING
        with controlled(server) as forward:
            forward.hold()
            call = asyncio.ensure_future(wire.inference.Generate(SHORT))
            await until(lambda: forward.calls == 1)
            draining = asyncio.ensure_future(server.drain_and_stop())
            assert await next_status(watch) == NOT_SERVING
            assert (await wire.health.Check(about(service))).status == NOT_SERVING
            assert not call.done()
        assert (await call).usage.completion_tokens == 3
        assert await asyncio.wait_for(watch.read(), 30) is grpc.aio.EOF
        await asyncio.wait_for(draining, 30)  # watchers do not hold up the end


async def test_a_watcher_that_leaves_does_not_silence_the_others(serving, connect, until):
    async with serving() as server:
        staying, leaving = connect(server), connect(server)
        watch = staying.health.Watch(about(""))
        assert await next_status(watch) == SERVING
        for _ in range(3):
            other = leaving.health.Watch(about(""))
            assert await next_status(other) == SERVING
            other.cancel()
        await leaving.channel.close()
        assert (await staying.health.Check(about(""))).status == SERVING
        draining = asyncio.ensure_future(server.drain_and_stop())
        assert await next_status(watch) == NOT_SERVING
        await draining


async def test_a_server_that_is_to_end_says_so_takes_requests_for_a_while_then_closes_its_ports(
    serving, connect, controlled, until, http_get
):
    async with serving(drain_delay=0.5) as server:
        wire = connect(server)

        async def readiness() -> list[int]:
            return [(await http_get(server, path))[0] for path in ("/healthz", "/readyz")]

        def refuses(port: int) -> bool:
            with socket.socket() as other:
                return other.connect_ex(("127.0.0.1", port)) != 0

        assert await readiness() == [200, 200]
        with controlled(server) as forward:
            forward.hold()
            early = asyncio.ensure_future(wire.inference.Generate(SHORT))
            await until(lambda: forward.calls == 1)
            draining = asyncio.ensure_future(server.drain_and_stop())
            await asyncio.sleep(0)
            # Alive, so that nobody kills it, but not ready.
            assert await readiness() == [200, 503]
            late = asyncio.ensure_future(connect(server).inference.Generate(SHORT))
            await until(lambda: server.engine.in_flight == 2)
            await until(lambda: refuses(server.port))
            assert not early.done()
            assert not late.done()
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await connect(server).inference.Generate(SHORT)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert await readiness() == [200, 503]
        assert (await early).usage.completion_tokens == 3
        assert (await late).usage.completion_tokens == 3
        await draining


async def test_a_closed_port_refuses_connections_and_leaves_those_that_stand(
    serving, connect, http_get
):
    async with serving() as server, serving() as other:
        wire = connect(server)
        await wire.inference.Generate(SHORT)
        server._listener.close_port()
        with socket.socket() as late:
            assert late.connect_ex(("127.0.0.1", server.port)) != 0
        assert (await wire.inference.Generate(SHORT)).usage.completion_tokens == 3
        assert (await http_get(server, "/readyz"))[0] == 200
        assert (await connect(other).inference.Generate(SHORT)).usage.completion_tokens == 3


async def test_requests_that_outlast_the_drain_timeout_are_told_to_go_elsewhere(
    serving, connect, controlled, details_of, until
):
    async with serving(drain_timeout=0.2) as server:
        wire = connect(server)
        with controlled(server) as forward:
            forward.seconds = 0.02
            request = make_request("hi", max_tokens=500, temperature=0, ignore_eos=True)
            request.response.token_ids = True
            call = wire.inference.GenerateStream(request)
            tokens = 0

            async def read() -> None:
                nonlocal tokens
                async for event in call:
                    tokens += len(event.delta.tokens)

            reading = asyncio.ensure_future(read())
            await until(lambda: forward.calls >= 2)
            await asyncio.wait_for(server.drain_and_stop(), 8)  # all of it would take 10 s
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await reading
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "stopped before this request was done" in error.value.details()
            assert details_of(error.value)["RetryInfo"].retry_delay.ToMilliseconds() == 1000
            assert 1 <= tokens < 400  # what was generated came first
        assert server.engine.engine.used_blocks == 0
        assert server.ended


async def test_a_client_that_does_not_read_does_not_hold_up_a_drain_beyond_its_bound(
    serving, connect, until, monkeypatch
):
    monkeypatch.setattr("sparserve.api.server._GRACE_SECONDS", 0.2)
    async with serving(drain_timeout=0.2) as server:
        narrow = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
        wire = connect(server, *narrow)
        call = wire.inference.GenerateStream(
            make_request("hi", max_tokens=480, temperature=0, ignore_eos=True, logprobs=True)
        )
        await call.read()
        await until(lambda: server.engine.engine.used_blocks == 0)
        await asyncio.wait_for(server.drain_and_stop(), 9)


async def test_a_step_that_does_not_end_does_not_keep_the_server_from_stopping(
    serving, connect, controlled, until, monkeypatch
):
    monkeypatch.setattr("sparserve.engine.async_engine._LAST_STEP_SECONDS", 0.2)
    async with serving(drain_timeout=0.1) as server:
        wire = connect(server)
        with controlled(server) as forward:
            forward.hold()
            call = asyncio.ensure_future(wire.inference.Generate(SHORT))
            await until(lambda: forward.calls == 1)
            await asyncio.wait_for(server.drain_and_stop(), 30)
            assert not server.ended  # so that the process can exit by other means
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_server_that_cannot_warm_up_leaves_nothing_behind(serving, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("no warm-up")

    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        ports = {"port": one.getsockname()[1], "metrics_port": two.getsockname()[1]}
    threads = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr("sparserve.model.reference.ReferenceBackend.forward", fail)
        with pytest.raises(RuntimeError, match="no warm-up"):
            async with serving(**ports):
                pass
    assert threading.active_count() == threads
    async with serving(**ports) as server:  # the ports are free again
        assert server.is_ready


async def test_a_server_can_listen_on_ipv6(serving):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with (
        serving(host="::1") as server,
        AsyncClient(f"[::1]:{server.port}") as client,
    ):
        assert (await client.generate("hello", max_tokens=1)).result.completion_tokens == 1
