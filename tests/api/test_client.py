"""The public clients: what goes with a call, what a stream tells of itself, and the control calls."""

import asyncio
import socket

import grpc
import pytest

from sparserve.client import AsyncClient, CallFailed, Client, InvalidRequest

GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture
def in_thread(server):
    """`await in_thread(lambda client: …)`: with a plain client, beside the server's loop."""

    def run(action, **options):
        with Client(f"127.0.0.1:{server.port}", **options) as client:
            return action(client)

    return lambda action, **options: asyncio.to_thread(run, action, **options)


async def test_a_stream_tells_its_id_first_so_that_it_can_be_aborted(client, in_thread):
    pieces = client.stream("hello", max_tokens=400, **GREEDY)
    first = await anext(pieces)
    assert first.request_id
    assert (first.text, first.tokens, first.result) == ("", (), None)
    assert await client.abort(first.request_id) == (first.request_id,)
    rest = [piece async for piece in pieces]
    assert {piece.request_id for piece in rest} == {first.request_id}
    assert rest[-1].result.finish_reason == "CANCELLED"
    assert rest[-1].result.request_id == first.request_id

    def plain(client):
        streams = [client.stream("hello", max_tokens=400, **GREEDY) for _ in range(2)]
        ids = [next(stream).request_id for stream in streams]
        aborted = client.abort([*ids, "never seen"])
        return ids, aborted, [list(stream)[-1].result.finish_reason for stream in streams]

    ids, aborted, reasons = await in_thread(plain)
    assert sorted(aborted) == sorted(ids)
    assert reasons == ["CANCELLED", "CANCELLED"]
    assert await client.abort(ids) == ()


async def test_a_stream_tells_what_ended_each_choice(client):
    fields = {"max_tokens": 30, "n": 2, "seed": 1, "token_ids": True, "request_id": "mine"}
    plain = await client.generate("hello", **fields)
    ending = plain.choices[0].token_ids[4]
    for more in ({"stop_token_ids": [ending]}, {"stop": list("aeiou ")}):
        whole = await client.generate("hello", **fields, **more)
        pieces = [piece async for piece in client.stream("hello", **fields, **more)]
        ends = {
            p.index: (p.finish_reason, p.stop, p.stop_token_id) for p in pieces if p.finish_reason
        }
        assert ends == {c.index: (c.finish_reason, c.stop, c.stop_token_id) for c in whole.choices}
        for result in (whole.result, pieces[-1].result):
            assert (result.finish_reason, result.stop, result.stop_token_id) == ends[0]
            assert result.request_id == "mine"
    assert any(stop for _, stop, _ in ends.values())
    stopped = await client.generate("hello", **fields, stop_token_ids=[ending])
    assert stopped.result.stop_token_id == ending


async def test_metadata_reaches_the_server(client, in_thread, caplog):
    caplog.set_level("INFO")
    trace = "0af7651916cd43dd8448eb211c80319c"
    metadata = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    calls = [
        lambda c: c.generate("hi", max_tokens=1, metadata=metadata),
        lambda c: c.chat([{"role": "user", "content": "hi"}], max_tokens=1, metadata=metadata),
        lambda c: c.tokenize("hi", metadata=metadata),
        lambda c: c.detokenize([72], metadata=metadata),
        lambda c: c.abort("x", metadata=metadata),
        lambda c: c.model_info(metadata=metadata),
        lambda c: c.server_info(metadata=metadata),
        lambda c: c.load(metadata=metadata),
        lambda c: c.list_models(metadata=metadata),
        lambda c: c.tokenizer_files(metadata=metadata),
    ]
    for call in calls:
        await call(client)
        await in_thread(call)
    [piece async for piece in client.stream("hi", max_tokens=1, metadata=metadata)]
    lines = [r for r in caplog.records if r.name == "sparserve.access"]
    assert [getattr(line, "trace_id", None) for line in lines] == [trace] * (2 * len(calls) + 1)


async def test_every_call_takes_a_timeout():
    calls = [
        lambda c: c.generate("hi", timeout=0.05),
        lambda c: c.tokenize("hi", timeout=0.05),
        lambda c: c.detokenize([72], timeout=0.05),
        lambda c: c.abort("x", timeout=0.05),
        lambda c: c.drain(timeout=0.05),
        lambda c: c.model_info(timeout=0.05),
        lambda c: c.server_info(timeout=0.05),
        lambda c: c.load(timeout=0.05),
        lambda c: c.list_models(timeout=0.05),
        lambda c: c.tokenizer_files(timeout=0.05),
    ]
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        target = f"127.0.0.1:{silent.getsockname()[1]}"

        def plain(call):
            with Client(target) as client:
                call(client)

        for call in calls:
            async with AsyncClient(target) as client:
                with pytest.raises(CallFailed, match="DEADLINE_EXCEEDED"):
                    await call(client)
            with pytest.raises(CallFailed, match="DEADLINE_EXCEEDED"):
                await asyncio.to_thread(plain, call)


async def test_models_are_listed_and_can_be_named_everywhere(client, in_thread, tiny_folder):
    assert await client.list_models() == (tiny_folder.name,)
    assert await in_thread(lambda c: c.list_models()) == (tiny_folder.name,)
    calls = [
        lambda c, name: c.tokenize("hi", model=name),
        lambda c, name: c.detokenize([72], model=name),
        lambda c, name: c.model_info(model=name),
        lambda c, name: c.tokenizer_files(model=name),
    ]
    for call in calls:
        assert await call(client, tiny_folder.name) == await call(client, None)
        for ask in (call(client, "gpt-9"), in_thread(lambda c, call=call: call(c, "gpt-9"))):
            with pytest.raises(CallFailed, match="NOT_FOUND"):
                await ask


async def test_what_control_calls_cannot_send_is_refused(client):
    for call, field in (
        (client.abort([1]), "request_ids[0]"),
        (client.abort(5), "request_ids"),
        (client.detokenize("hi"), "token_ids"),
        (client.tokenize(5), "text"),
        (client.drain("1"), "timeout_seconds"),
        (client.load(timeout="1"), "timeout"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            await call
        assert refused.value.field == field


async def test_a_channel_has_the_options_that_it_is_given(server, in_thread):
    small = {"grpc.max_receive_message_length": 10}
    async with AsyncClient(f"127.0.0.1:{server.port}", options=small) as client:
        with pytest.raises(CallFailed, match="RESOURCE_EXHAUSTED"):
            await client.model_info()
    with pytest.raises(CallFailed, match="RESOURCE_EXHAUSTED"):
        await in_thread(lambda c: c.model_info(), options=list(small.items()))


async def test_credentials_make_the_channel_secure(server, in_thread):
    secure = grpc.ssl_channel_credentials()  # the server here speaks plain text
    async with AsyncClient(f"127.0.0.1:{server.port}", credentials=secure) as client:
        with pytest.raises(CallFailed, match="UNAVAILABLE"):
            await client.load(timeout=20)
    with pytest.raises(CallFailed, match="UNAVAILABLE"):
        await in_thread(lambda c: c.load(timeout=20), credentials=secure)
