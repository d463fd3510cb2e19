"""Who leaves is not computed for: its KV blocks are free before the next step."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from sparserve.client import Client, make_request
from sparserve.errors import CallFailed
from sparserve.v1 import control_pb2, inference_pb2_grpc
from sparserve.v1 import inference_pb2 as pb

GREEDY = {"temperature": 0.0, "ignore_eos": True}
LONG = make_request("hello", request_id="long", max_tokens=400, **GREEDY)


class Link:
    """A TCP connection between a client and the server that can break."""

    def __init__(self) -> None:
        self.port = 0
        self._writers: list[asyncio.StreamWriter] = []

    @asynccontextmanager
    async def to(self, port: int) -> AsyncIterator["Link"]:
        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
            except ConnectionError:
                pass
            finally:
                writer.close()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
            self._writers += [writer, far_writer]
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

        async with await asyncio.start_server(accept, "127.0.0.1", 0) as listener:
            self.port = listener.sockets[0].getsockname()[1]
            yield self
            self.cut()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


@pytest.fixture
def load(server, connect):
    """What GetLoad tells, over a connection of its own."""
    control = connect(server).control
    return lambda: control.GetLoad(control_pb2.GetLoadRequest())


async def leaves_at_once(server, forward, until, leave) -> None:
    """Hold a decode step, leave, let the step end: there must be no step more for the request."""
    await until(lambda: forward.calls >= 3)
    forward.hold()
    held = forward.calls
    await until(lambda: forward.calls > held)  # the call that now waits
    assert server.engine.engine.used_blocks > 0
    calls = forward.calls
    await leave()
    forward.release()
    await until(lambda: server.engine.engine.used_blocks == 0, "all blocks are free")
    assert forward.calls == calls
    assert server.engine.in_flight == 0


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
@pytest.mark.parametrize("way", ["cancel", "close", "deadline", "lost connection"])
async def test_who_leaves_in_decode_frees_its_blocks_before_the_next_step(
    server, load, controlled, until, method, way
):
    with controlled(server) as forward:
        async with (
            Link().to(server.port) as link,
            grpc.aio.insecure_channel(f"127.0.0.1:{link.port}") as channel,
        ):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            call = getattr(stub, method)(LONG, timeout=2.5 if way == "deadline" else None)

            async def leave() -> None:
                if way == "cancel":
                    call.cancel()
                elif way == "close":
                    await channel.close()
                elif way == "lost connection":
                    link.cut()
                await until(lambda: server.engine.in_flight == 0, "the server knows it")

            forward.seconds = 0.005
            await leaves_at_once(server, forward, until, leave)
            if way == "deadline":
                assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await load()).used_kv_blocks == 0


@pytest.mark.parametrize("way", ["cancel", "close", "deadline", "abort"])
async def test_who_leaves_the_queue_is_forgotten_and_nobody_else_notices(
    serving, connect, controlled, until, way
):
    async with serving(max_running=1) as server:
        engine = server.engine.engine
        first, second = connect(server), connect(server)
        alone = await first.inference.Generate(make_request("hi", max_tokens=20, **GREEDY))
        with controlled(server) as forward:
            forward.hold()
            running = first.inference.Generate(make_request("hi", max_tokens=20, **GREEDY))
            running = asyncio.ensure_future(running)
            await until(lambda: forward.calls == 1)
            waiting = second.inference.GenerateStream(
                LONG, timeout=2 if way == "deadline" else None
            )
            await until(lambda: server.engine.in_flight == 2)
            if way == "cancel":
                waiting.cancel()
            elif way == "close":
                await second.channel.close()
            elif way == "abort":
                aborted = await first.control.Abort(control_pb2.AbortRequest(request_ids=["long"]))
                assert list(aborted.aborted) == ["long"]
            if way != "abort":  # that one ends its stream in order, at the end of the step
                await until(lambda: server.engine.in_flight == 1)
            forward.release()
            answer = await running
            assert answer.choices == alone.choices
            assert forward.calls == 20
        if way == "abort":
            events = [(await waiting.read()).WhichOneof("event") for _ in range(3)]
            assert events == ["started", "finished", "summary"]
        assert engine.num_waiting == engine.used_blocks == server.engine.in_flight == 0


async def test_abort_ends_a_stream_with_cancelled_and_ok(server, wire, load, controlled, until):
    with controlled(server) as forward:
        forward.seconds = 0.005
        call = wire.inference.GenerateStream(LONG)

        async def leave() -> None:
            response = await wire.control.Abort(
                control_pb2.AbortRequest(request_ids=["long", "no"])
            )
            assert list(response.aborted) == ["long"]
            assert list(response.not_found) == ["no"]

        await leaves_at_once(server, forward, until, leave)
        events = [event async for event in call]
    assert await call.code() is grpc.StatusCode.OK
    assert events[-2].finished.reason == pb.FINISH_REASON_CANCELLED
    usage = events[-1].summary.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, forward.calls)
    assert (await load()).used_kv_blocks == 0


async def test_abort_ends_a_unary_call_with_the_text_so_far(server, wire, controlled, until):
    whole = await wire.inference.Generate(LONG)
    with controlled(server) as forward:
        forward.seconds = 0.005
        call = asyncio.ensure_future(wire.inference.Generate(LONG))
        await until(lambda: forward.calls >= 10)
        await wire.control.Abort(control_pb2.AbortRequest(request_ids=["long"]))
        response = await call
    choice = response.choices[0]
    assert choice.finished.reason == pb.FINISH_REASON_CANCELLED
    assert 9 <= response.usage.completion_tokens < 400
    assert choice.text
    assert whole.choices[0].text.startswith(choice.text)


async def test_the_id_of_an_aborted_request_can_be_used_at_once(server, connect, until):
    wire, other = connect(server), connect(server)
    for _ in range(10):
        call = wire.inference.GenerateStream(LONG)
        await call.read()
        await other.control.Abort(control_pb2.AbortRequest(request_ids=["long"]))
        while (await call.read()).WhichOneof("event") != "summary":
            pass
        again = make_request("hello", request_id="long", max_tokens=2, **GREEDY)
        response = await other.inference.Generate(again)
        assert response.choices[0].finished.reason == pb.FINISH_REASON_LENGTH


async def test_an_aborted_id_is_unknown_a_second_time(wire, server, until):
    call = wire.inference.GenerateStream(LONG)
    await call.read()
    first = await wire.control.Abort(control_pb2.AbortRequest(request_ids=["long"]))
    await until(lambda: server.engine.in_flight == 0)
    second = await wire.control.Abort(control_pb2.AbortRequest(request_ids=["long"]))
    assert (list(first.aborted), list(second.not_found)) == (["long"], ["long"])


async def test_one_leaving_changes_nothing_for_the_others(client, wire):
    fields = {"max_tokens": 60, "token_ids": True, "seed": 5, "ignore_eos": True}
    alone = [await client.generate("ab" * n, **fields) for n in (1, 20)]
    calls = [
        wire.inference.GenerateStream(make_request("x" * 40, max_tokens=400)) for _ in range(4)
    ]
    together = asyncio.gather(*(client.generate("ab" * n, **fields) for n in (1, 20)))
    for call in calls:
        await call.read()
        call.cancel()
    assert [g.token_ids for g in await together] == [g.token_ids for g in alone]


async def test_a_client_that_does_not_read_holds_no_place_and_can_leave(server, connect, until):
    """Its stream fills up; the request is computed to its end, and forgotten."""
    narrow = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    wire = connect(server, *narrow)
    call = wire.inference.GenerateStream(
        make_request("hello", request_id="a", max_tokens=480, logprobs=True, **GREEDY)
    )
    await call.read()
    await until(lambda: server.engine.in_flight == 0, "the request is done, read or not")
    again = await wire.inference.Generate(make_request("hello", request_id="a", max_tokens=1))
    assert again.usage.completion_tokens == 1
    pieces = []
    while (event := await call.read()) is not grpc.aio.EOF:
        pieces.append(event)
    assert pieces[-1].summary.usage.completion_tokens == 480
    assert sum(len(piece.delta.tokens) for piece in pieces) >= 479 - 1


async def test_who_leaves_without_having_read_frees_its_blocks(server, connect, controlled, until):
    narrow = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    wire = connect(server, *narrow)
    with controlled(server) as forward:
        forward.seconds = 0.002
        call = wire.inference.GenerateStream(
            make_request("hello", max_tokens=480, logprobs=True, **GREEDY)
        )
        await call.read()
        await until(lambda: forward.calls > 150, "the window is full and the handler waits")
        forward.seconds = 0.01
        call.cancel()
        await until(lambda: server.engine.engine.used_blocks == 0)
        assert forward.calls < 470


async def test_closing_the_clients_iterator_ends_the_request(server, client, controlled, until):
    with controlled(server) as forward:
        forward.seconds = 0.01
        pieces = client.stream("hello", max_tokens=400, **GREEDY)
        await anext(pieces)
        await pieces.aclose()
        await until(lambda: server.engine.engine.used_blocks == 0)

        def plain() -> None:
            with Client(f"127.0.0.1:{server.port}") as connected:
                pieces = connected.stream("hello", max_tokens=400, **GREEDY)
                next(pieces)
                pieces.close()

        await asyncio.to_thread(plain)
        await until(lambda: server.engine.in_flight == 0)
        assert forward.calls < 700


async def test_the_clients_can_abort_and_have_deadlines(server, client, controlled):
    with controlled(server) as forward:
        forward.seconds = 0.01
        pieces = client.stream("hello", request_id="mine", max_tokens=400, **GREEDY)
        await anext(pieces)
        assert await client.abort("mine")
        results = [piece.result async for piece in pieces]
        assert results[-1].finish_reason == "CANCELLED"
        assert not await client.abort("mine")
        with pytest.raises(CallFailed) as failed:
            await client.generate("hello", max_tokens=400, timeout=0.1, **GREEDY)
        assert failed.value.code == "DEADLINE_EXCEEDED"
