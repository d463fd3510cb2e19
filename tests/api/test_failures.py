"""Too many requests, failing steps, a dead engine: everybody gets an answer, and soon."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2

from sparse_kernels._abi import sk_status
from sparse_kernels.native import DeviceLost
from sparserve.client import AsyncClient, make_request
from sparserve.errors import CallFailed

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SHORT = make_request("hello", max_tokens=3, temperature=0, ignore_eos=True)


async def health(wire) -> int:
    return (await wire.health.Check(health_pb2.HealthCheckRequest())).status


@pytest.mark.parametrize(("max_running", "max_waiting"), [(1, 0), (1, 1), (2, 3)])
async def test_one_request_too_many_is_told_to_come_back_and_the_others_finish(
    serving, connect, controlled, details_of, until, max_running, max_waiting
):
    limit = max_running + max_waiting
    async with serving(max_running=max_running, max_waiting=max_waiting) as server:
        wire = connect(server)
        with controlled(server) as forward:
            forward.hold()
            accepted = [asyncio.ensure_future(wire.inference.Generate(SHORT)) for _ in range(limit)]
            await until(lambda: server.engine.in_flight == limit)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await wire.inference.Generate(SHORT)
            async with AsyncClient(f"127.0.0.1:{server.port}") as client:
                with pytest.raises(CallFailed) as failed:
                    async for _ in client.stream("hello"):
                        pass
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"{limit} requests in flight, the limit is {limit}" in error.value.details()
        details = details_of(error.value)
        assert details["RetryInfo"].retry_delay.ToMilliseconds() == 1000
        (violation,) = details["QuotaFailure"].violations
        assert violation.subject == "requests in flight"
        assert (failed.value.code, failed.value.retry_after) == ("RESOURCE_EXHAUSTED", 1.0)
        answers = await asyncio.gather(*accepted)
        assert all(answer.usage.completion_tokens == 3 for answer in answers)
        await wire.inference.Generate(SHORT)


async def test_a_failed_step_ends_its_requests_with_an_id_that_the_log_has(
    serving, connect, controlled, details_of, until, caplog
):
    async with serving(max_running=2) as server:
        wire = connect(server)
        with controlled(server) as forward:
            forward.hold()
            forward.fail(ZeroDivisionError("the secret reason"), times=1)
            calls = [asyncio.ensure_future(wire.inference.Generate(SHORT))]
            await until(lambda: forward.calls == 1)  # the step that fails has this one alone
            calls += [asyncio.ensure_future(wire.inference.Generate(SHORT)) for _ in range(3)]
            await until(lambda: server.engine.in_flight == 4)
            forward.release()
            failed, *served = await asyncio.gather(*calls, return_exceptions=True)
        assert failed.code() is grpc.StatusCode.INTERNAL
        info = details_of(failed)["ErrorInfo"]
        assert info.reason == "ENGINE_FAILURE"
        error_id = info.metadata["error_id"]
        assert error_id in failed.details()
        assert "secret" not in failed.details()
        assert [r for r in caplog.records if error_id in r.getMessage() and r.exc_info]
        assert "the secret reason" in caplog.text
        assert [answer.usage.completion_tokens for answer in served] == [3, 3, 3]
        assert await health(wire) == SERVING
        assert server.engine.engine.used_blocks == 0


async def test_a_stream_that_fails_half_way_ends_with_a_status_after_its_tokens(
    server, wire, controlled, until
):
    with controlled(server) as forward:
        forward.seconds = 0.005
        call = wire.inference.GenerateStream(
            make_request("hello", max_tokens=400, temperature=0, ignore_eos=True, token_ids=True)
        )
        await until(lambda: forward.calls >= 5)
        forward.fail(RuntimeError("broken"), times=1)
        kinds, tokens = [], 0

        async def read() -> None:
            nonlocal tokens
            async for event in call:
                kinds.append(event.WhichOneof("event"))
                tokens += len(event.delta.tokens)

        with pytest.raises(grpc.aio.AioRpcError) as error:
            await read()
        assert error.value.code() is grpc.StatusCode.INTERNAL
        assert set(kinds) == {"started", "delta"}
        # Every token of the steps before: not the one that failed, not the test of the backend after it.
        assert tokens == forward.calls - 2
        assert (await wire.inference.Generate(SHORT)).usage.completion_tokens == 3


async def test_failures_with_good_steps_between_do_not_end_the_engine(server, wire, controlled):
    with controlled(server) as forward:
        for _ in range(4):
            forward.fail(RuntimeError("broken"), times=4)  # two steps, each with a test after it
            for _ in range(2):
                with pytest.raises(grpc.aio.AioRpcError):
                    await wire.inference.Generate(SHORT)
            assert (await wire.inference.Generate(SHORT)).usage.completion_tokens == 3
    assert await health(wire) == SERVING


async def gone_for_good(server, wire, details_of, http_get) -> None:
    """What a broken engine looks like from outside."""
    assert await health(wire) == NOT_SERVING
    assert (await http_get(server, "/healthz"))[0] == 503
    assert (await http_get(server, "/readyz"))[0] == 503
    assert (await http_get(server, "/metrics"))[0] == 200
    for call in (wire.inference.Generate(SHORT), wire.inference.GenerateStream(SHORT).read()):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await asyncio.wait_for(call, 30)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "broken" in refused.value.details()
        assert "RetryInfo" not in details_of(refused.value)  # it will not come back


async def test_a_backend_that_always_fails_takes_the_server_out_of_service(
    serving, connect, controlled, details_of, until, http_get, caplog
):
    async with serving(max_running=1) as server:
        wire = connect(server)
        watch = wire.health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        assert (await http_get(server, "/healthz"))[0] == 200
        with controlled(server) as forward:
            forward.hold()
            forward.fail(RuntimeError("broken"))
            calls = [asyncio.ensure_future(wire.inference.Generate(SHORT)) for _ in range(6)]
            await until(lambda: server.engine.in_flight == 6)
            forward.release()
            calls = asyncio.gather(*calls, return_exceptions=True)
            errors = await asyncio.wait_for(calls, 30)
            # The third failure in a row ended those that had not run, too.
            assert forward.calls == 6  # with a test of the backend after each
        for error in errors:
            assert error.code() is grpc.StatusCode.INTERNAL
            assert details_of(error)["ErrorInfo"].metadata["error_id"] in caplog.text
        assert (await asyncio.wait_for(watch.read(), 30)).status == NOT_SERVING
        await gone_for_good(server, wire, details_of, http_get)
        stopping = asyncio.ensure_future(server.drain_and_stop())
        await asyncio.wait_for(stopping, 30)


@pytest.mark.parametrize("where", ["step", "add"])
async def test_an_error_outside_of_a_step_takes_the_server_out_of_service(
    server, wire, controlled, details_of, until, http_get, monkeypatch, caplog, where
):
    def fail(*_: object) -> None:
        raise RuntimeError("outside")

    with controlled(server) as forward:
        forward.hold()
        calls = [asyncio.ensure_future(wire.inference.Generate(SHORT))]
        await until(lambda: forward.calls == 1)
        monkeypatch.setattr(server.engine.engine, where, fail)
        calls.append(asyncio.ensure_future(wire.inference.Generate(SHORT)))
        await until(lambda: server.engine.in_flight == 2)
        forward.release()
        calls = asyncio.gather(*calls, return_exceptions=True)
        errors = await asyncio.wait_for(calls, 30)
    for error in errors:
        assert error.code() is grpc.StatusCode.INTERNAL
        assert details_of(error)["ErrorInfo"].metadata["error_id"] in caplog.text
    assert "outside" in caplog.text
    await gone_for_good(server, wire, details_of, http_get)


async def test_an_unexpected_error_in_a_call_is_internal_with_an_id_and_no_traceback(
    server, wire, details_of, monkeypatch, caplog
):
    def fail(*_: object) -> None:
        raise KeyError("the secret reason")

    monkeypatch.setattr(server.engine.engine, "validate", fail)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await wire.inference.Generate(SHORT)
    assert error.value.code() is grpc.StatusCode.INTERNAL
    info = details_of(error.value)["ErrorInfo"]
    assert info.reason == "UNEXPECTED"
    assert info.metadata["error_id"] in error.value.details()
    assert info.metadata["error_id"] in caplog.text
    assert "secret" in caplog.text
    assert "secret" not in error.value.details()
    monkeypatch.undo()
    assert (await wire.inference.Generate(SHORT)).usage.completion_tokens == 3


async def test_a_lost_gpu_ends_all_requests_with_unavailable_and_then_the_server(
    serving, connect, controlled, details_of, until, http_get, caplog
):
    async with serving(max_running=2) as server:
        wire = connect(server)
        watch = wire.health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        running = asyncio.ensure_future(server.run_until_signalled())
        with controlled(server) as forward:
            forward.hold()
            lost = DeviceLost(sk_status.SK_STATUS_DEVICE, "GPU 0 failed: an illegal address")
            forward.fail(lost)
            # Some run, the others wait for a place.
            calls = [asyncio.ensure_future(wire.inference.Generate(SHORT)) for _ in range(4)]
            await until(lambda: server.engine.in_flight == 4)
            forward.release()
            calls = asyncio.gather(*calls, return_exceptions=True)
            errors = await asyncio.wait_for(calls, 30)
            assert forward.calls == 1, "nothing is tried on it again"
        for error in errors:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "the GPU failed and the server ends; error id " in error.details()
            assert "RetryInfo" not in details_of(error)
        error_id = errors[0].details().split("error id ")[1].split()[0]
        assert f"the GPU failed, error id {error_id}" in caplog.text
        assert "an illegal address" in caplog.text
        assert (await asyncio.wait_for(watch.read(), 30)).status == NOT_SERVING
        await asyncio.wait_for(running, 30)
        assert server.lost_device
        assert server.ended
