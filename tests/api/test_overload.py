"""Too much asked for, and too little read: refused or ended with a status, nobody else the worse."""

import asyncio

import grpc
import pytest

from sparserve.client import make_request

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


async def read_all(call) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_stream_that_nobody_reads_ends_and_frees_its_blocks(
    serving, connect, until, details_of
):
    async with serving(max_stream_backlog=20) as server:
        # Large pieces, more than so small a window lets a connection hold in flight.
        wire = connect(server, ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024))
        unread = wire.inference.GenerateStream(
            make_request("hello", max_tokens=500, ignore_eos=True, top_logprobs=64, temperature=0)
        )
        assert (await unread.read()).WhichOneof("event") == "started"
        await until(lambda: server.engine.in_flight == 0)
        engine = server.engine.engine
        await until(lambda: engine.used_blocks == engine.num_running == 0)
        assert engine.metrics.slow_readers._value.get() == 1
        assert not unread.done()
        answer = await wire.inference.Generate(make_request("others go on", max_tokens=3))
        assert answer.usage.completion_tokens > 0
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await read_all(unread)
    assert error.value.code() is EXHAUSTED
    assert "the limit is 20" in error.value.details()
    assert details_of(error.value)["ErrorInfo"].reason == "SLOW_READER"


async def test_prompts_beyond_the_waiting_tokens_are_told_to_come_back(
    serving, connect, controlled, until, details_of
):
    async with serving(max_waiting_tokens=100, max_running=1) as server:
        wire = connect(server)
        request = make_request("x" * 60, max_tokens=2, ignore_eos=True)
        with controlled(server) as forward:
            forward.hold()
            first = asyncio.ensure_future(wire.inference.Generate(request))
            await until(lambda: server.engine.in_flight == 1)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await wire.inference.Generate(request)
        assert error.value.code() is EXHAUSTED
        assert "60 prompt tokens waiting, the limit is 100" in error.value.details()
        assert details_of(error.value)["RetryInfo"].retry_delay.ToMilliseconds() == 1000
        await first
        # Alone, even a larger one is served.
        large = await wire.inference.Generate(make_request("y" * 300, max_tokens=2))
        assert large.usage.prompt_tokens == 300


async def test_choices_count_as_requests(serving, connect, controlled, until):
    async with serving(max_running=2, max_waiting=1) as server:
        wire = connect(server)
        with controlled(server) as forward:
            forward.hold()
            two = asyncio.ensure_future(wire.inference.Generate(make_request("a", n=2)))
            await until(lambda: server.engine.in_flight == 1)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await wire.inference.Generate(make_request("b", n=2))
            one = asyncio.ensure_future(wire.inference.Generate(make_request("c", max_tokens=2)))
            await until(lambda: server.engine.in_flight == 2)
        assert error.value.code() is EXHAUSTED
        assert len((await two).choices) == 2
        await one


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": 31}, "stopping.max_tokens is 31; this server grants 30 at most"),
        ({"n": 4}, "sampling.n is 4; this server makes 3 at most"),
    ],
)
async def test_the_operators_maximums_hold(serving, connect, fields, named):
    async with serving(max_new_tokens=30, max_choices=3) as server:
        wire = connect(server)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await wire.inference.Generate(make_request("hello", **fields))
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.value.details() == named
        answer = await wire.inference.Generate(make_request("hello", ignore_eos=True))
        assert answer.usage.completion_tokens == 30


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_deadline_counts_as_one_however_the_call_learns_of_it(
    serving, connect, controlled, until, caplog, streaming
):
    caplog.set_level("INFO", "sparserve.access")
    async with serving() as server:
        wire = connect(server)
        request = make_request("hello", max_tokens=300, ignore_eos=True)
        with controlled(server) as forward:
            forward.seconds = 0.02
            for _ in range(5):
                call = (wire.inference.GenerateStream if streaming else wire.inference.Generate)(
                    request, timeout=0.2
                )
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await (read_all(call) if streaming else call)
                assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: not server.engine.engine.has_work)
        finished = server.engine.engine.metrics.requests_finished
        assert finished.labels(reason="deadline")._value.get() == 5
        assert finished.labels(reason="cancelled")._value.get() == 0
        codes = [r.code for r in caplog.records if r.name == "sparserve.access"]
        assert codes == ["DEADLINE_EXCEEDED"] * 5


async def test_the_log_line_of_a_call_tells_how_it_went(serving, connect, caplog):
    caplog.set_level("INFO", "sparserve.access")
    async with serving() as server:
        wire = connect(server)
        request = make_request("x" * 40, max_tokens=3, ignore_eos=True, n=2, request_id="mine")
        await wire.inference.Generate(request)
        await wire.inference.Generate(request)
        with pytest.raises(grpc.aio.AioRpcError):
            await wire.inference.Generate(make_request("x", temperature=3))
    first, second, refused = (r for r in caplog.records if r.name == "sparserve.access")
    assert (first.finish_reason, first.cached_tokens) == ("length,length", 0)
    assert first.ttft_ms > 0
    assert second.cached_tokens == 32
    assert refused.field == "sampling.temperature"


async def test_options_that_exclude_each_other_are_the_callers_fault(serving, connect):
    async with serving() as server:
        wire = connect(server)
        request = make_request("x", regex="a+", allowed_token_ids=[66])
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await wire.inference.Generate(request)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        finished = server.engine.engine.metrics.requests_finished
        assert finished.labels(reason="invalid")._value.get() == 1
        assert finished.labels(reason="error")._value.get() == 0
