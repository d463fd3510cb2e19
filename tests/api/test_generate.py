"""Generate and GenerateStream: what a well-formed request gets."""

import asyncio
import random
import time
from dataclasses import replace

import pytest

from sparserve.client import AsyncClient, Client, make_request
from sparserve.v1 import inference_pb2 as pb

GREEDY = {"temperature": 0.0, "ignore_eos": True}


async def events(wire, request: pb.GenerateRequest) -> list[pb.GenerateStreamResponse]:
    return [event async for event in wire.inference.GenerateStream(request)]


def deltas(stream: list[pb.GenerateStreamResponse]) -> list[pb.Delta]:
    return [event.delta for event in stream if event.WhichOneof("event") == "delta"]


def text_of(stream: list[pb.GenerateStreamResponse]) -> str:
    return "".join(delta.text for delta in deltas(stream))


def ids_of(stream: list[pb.GenerateStreamResponse]) -> list[int]:
    return [token.id for delta in deltas(stream) for token in delta.tokens]


async def test_a_stream_is_started_then_deltas_then_finished_then_summary(wire):
    request = make_request("hello", max_tokens=20, request_id="mine", **GREEDY)
    stream = await events(wire, request)
    kinds = [event.WhichOneof("event") for event in stream]
    assert kinds[0] == "started"
    assert kinds[-2:] == ["finished", "summary"]
    assert set(kinds[1:-2]) == {"delta"}
    started = stream[0].started
    assert (started.request_id, started.prompt_tokens) == ("mine", 5)
    assert stream[-2].finished.reason == pb.FINISH_REASON_LENGTH
    assert stream[-1].summary.usage == pb.Usage(prompt_tokens=5, completion_tokens=20)


@pytest.mark.parametrize("seed", range(4))
async def test_deltas_join_to_the_unary_text_and_to_the_decoded_ids(server, wire, seed):
    request = make_request("hello", max_tokens=80, seed=seed, ignore_eos=True, token_ids=True)
    stream, unary = await events(wire, request), await wire.inference.Generate(request)
    choice = unary.choices[0]
    assert text_of(stream) == choice.text
    assert ids_of(stream) == [token.id for token in choice.tokens]
    assert len(choice.tokens) == 80
    decoded = server.engine.engine.tokenizer.decode(ids_of(stream))
    # A character that the last token leaves unfinished is not sent.
    assert decoded in (choice.text, choice.text + "\N{REPLACEMENT CHARACTER}")
    assert len(choice.text) > 20


async def test_unary_and_stream_report_the_same_end(wire):
    request = make_request("hello", max_tokens=9, **GREEDY)
    stream, unary = await events(wire, request), await wire.inference.Generate(request)
    assert unary.choices[0].finished == stream[-2].finished
    assert unary.usage == stream[-1].summary.usage
    assert unary.sparsity == stream[-1].summary.sparsity
    assert unary.model == stream[0].started.model != ""


async def test_a_request_without_an_id_gets_one_of_its_own(wire):
    request = make_request("hello", max_tokens=1)
    first, second = await wire.inference.Generate(request), await wire.inference.Generate(request)
    assert first.request_id
    assert second.request_id not in ("", first.request_id)


async def test_timings_split_the_request_into_queue_prefill_and_decode(
    serving, connect, controlled, until
):
    async with serving(max_running=1) as server:
        wire = connect(server)
        with controlled(server) as forward:
            forward.seconds = 0.03
            begun = time.monotonic()
            before = wire.inference.GenerateStream(make_request("a", max_tokens=400, **GREEDY))
            await before.read()
            behind = asyncio.ensure_future(
                wire.inference.Generate(make_request("b", max_tokens=6, **GREEDY))
            )
            await until(lambda: server.engine.engine.num_waiting == 1)
            calls = forward.calls
            await until(lambda: forward.calls >= calls + 3)  # two whole steps
            before.cancel()
            times = (await behind).timings
            took = time.monotonic() - begun
    assert times.queue_seconds >= 2 * 0.03
    assert times.prefill_seconds >= 0.03
    assert times.decode_seconds >= 5 * 0.03
    assert times.ttft_seconds == pytest.approx(times.queue_seconds + times.prefill_seconds)
    assert times.ttft_seconds + times.decode_seconds <= took


async def test_waiting_for_a_step_under_way_is_part_of_queue_and_first_token_time(
    server, wire, controlled, until
):
    with controlled(server) as forward:
        forward.hold()
        first = asyncio.ensure_future(wire.inference.Generate(make_request("a", max_tokens=1)))
        await until(lambda: forward.calls == 1)
        second = asyncio.ensure_future(wire.inference.Generate(make_request("b", max_tokens=1)))
        await until(lambda: server.engine.in_flight == 2)
        begun = time.monotonic()
        await asyncio.sleep(0.1)
        waited = time.monotonic() - begun
    await first
    times = (await second).timings
    assert times.queue_seconds >= waited
    assert times.ttft_seconds >= waited


async def test_tokens_come_only_when_asked_for(wire):
    plain = await wire.inference.Generate(make_request("hello", max_tokens=4, **GREEDY))
    assert not plain.choices[0].tokens
    assert not any(
        d.tokens for d in deltas(await events(wire, make_request("hello", max_tokens=4, **GREEDY)))
    )
    ids = await wire.inference.Generate(
        make_request("hello", max_tokens=4, token_ids=True, **GREEDY)
    )
    assert len(ids.choices[0].tokens) == 4
    assert not any(token.HasField("logprob") for token in ids.choices[0].tokens)


async def test_logprobs_come_with_ids_and_do_not_depend_on_temperature(wire):
    fields = {"max_tokens": 12, "logprobs": True, "ignore_eos": True}
    greedy = await wire.inference.Generate(make_request("hello", temperature=0, **fields))
    tokens = greedy.choices[0].tokens
    assert len(tokens) == 12
    assert all(token.HasField("logprob") and token.logprob < 0 for token in tokens)
    # top_k=1 takes the same tokens at any temperature; their model probability stays the same.
    hot = await wire.inference.Generate(make_request("hello", temperature=2, top_k=1, **fields))
    assert list(hot.choices[0].tokens) == list(tokens)


async def test_text_false_sends_no_text(wire):
    request = make_request("hello", max_tokens=6, token_ids=True, **GREEDY)
    request.response.text = False
    unary, stream = await wire.inference.Generate(request), await events(wire, request)
    assert unary.choices[0].text == text_of(stream) == ""
    assert len(unary.choices[0].tokens) == len(ids_of(stream)) == 6
    request.response.token_ids = False
    kinds = [event.WhichOneof("event") for event in await events(wire, request)]
    assert kinds == ["started", "finished", "summary"]


async def test_text_and_its_token_ids_are_the_same_prompt(client, server):
    ids = server.engine.engine.tokenizer.encode("hello", 100)
    by_text = await client.generate("hello", max_tokens=10, **GREEDY)
    by_ids = await client.generate(ids, max_tokens=10, **GREEDY)
    assert by_text.text == by_ids.text != ""
    assert by_ids.result.prompt_tokens == len(ids)


async def test_the_same_seed_gives_the_same_tokens_whatever_else_runs(client):
    fields = {"max_tokens": 40, "seed": 2**64 - 1, "token_ids": True, "ignore_eos": True}
    alone = await client.generate("hello", **fields)
    noise = [
        client.generate("x" * random.Random(i).randint(1, 200), max_tokens=60, ignore_eos=True)
        for i in range(10)
    ]
    busy, *_ = await asyncio.gather(client.generate("hello", **fields), *noise)
    assert busy.token_ids == alone.token_ids
    other = await client.generate("hello", **{**fields, "seed": 1})
    assert other.token_ids != alone.token_ids


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-40])
async def test_a_temperature_near_0_is_greedy(client, temperature):
    fields = {"max_tokens": 60, "token_ids": True, "ignore_eos": True}
    greedy = await client.generate("hello", temperature=0, **fields)
    for seed in range(5):
        cold = await client.generate("hello", temperature=temperature, seed=seed, **fields)
        assert cold.token_ids == greedy.token_ids


async def test_without_a_seed_two_answers_differ(client):
    first, second = [
        await client.generate("hello", max_tokens=40, token_ids=True, ignore_eos=True)
        for _ in range(2)
    ]
    assert first.token_ids != second.token_ids


@pytest.mark.parametrize("seed", [3, 4])
async def test_a_stop_string_across_token_borders_is_never_partly_in_the_text(wire, seed):
    request = make_request("hello", max_tokens=60, seed=seed, ignore_eos=True)
    text = (await wire.inference.Generate(request)).choices[0].text
    for at in range(2, len(text) - 4, 7):
        stop = text[at : at + 4]  # of at least four tokens: the tiny model's are bytes
        request.stopping.stop[:] = [stop]
        stream, unary = await events(wire, request), await wire.inference.Generate(request)
        assert text_of(stream) == unary.choices[0].text == text[: text.index(stop)]
        assert stream[-2].finished == unary.choices[0].finished
        assert stream[-2].finished.reason == pb.FINISH_REASON_STOP_STRING
        assert stream[-2].finished.stop == stop


async def test_text_that_only_began_like_a_stop_string_is_sent(wire):
    request = make_request("hello", max_tokens=80, seed=3, ignore_eos=True)
    text = (await wire.inference.Generate(request)).choices[0].text
    request.stopping.stop.extend([text[-3:] + "never", text[4:8] + "\0never"])
    response = await wire.inference.Generate(request)
    assert response.choices[0].text == text
    assert response.choices[0].finished.reason == pb.FINISH_REASON_LENGTH


async def test_the_earliest_of_several_stop_strings_ends_the_text(wire):
    request = make_request("hello", max_tokens=80, seed=3, ignore_eos=True)
    text = (await wire.inference.Generate(request)).choices[0].text
    early, late = text[2:4], text[-4:-1]
    request.stopping.stop.extend([late, early])
    finished = (await wire.inference.Generate(request)).choices[0].finished
    assert finished.stop == early


async def test_the_end_of_sequence_token_ends_the_text_unless_ignored(client):
    fields = {"temperature": 2.0, "max_tokens": 300, "token_ids": True}
    for seed in range(50):
        ended = await client.generate([5, 6], seed=seed, **fields)
        if ended.result.finish_reason == "STOP_EOS":
            break
    assert ended.result.finish_reason == "STOP_EOS"
    assert ended.token_ids[-1] == 257
    assert "<eos>" not in ended.text
    ignored = await client.generate([5, 6], seed=seed, ignore_eos=True, **fields)
    assert len(ignored.token_ids) > len(ended.token_ids)
    assert ignored.token_ids[: len(ended.token_ids)] == ended.token_ids


async def test_finished_names_the_end_of_sequence_token(wire):
    for seed in range(50):
        request = make_request([5, 6], seed=seed, temperature=2.0, max_tokens=300)
        finished = (await wire.inference.Generate(request)).choices[0].finished
        if finished.reason == pb.FINISH_REASON_STOP_EOS:
            break
    assert finished.WhichOneof("matched") == "token_id"
    assert finished.token_id == 257


async def test_max_tokens_defaults_to_the_servers(serving):
    async with (
        serving(default_max_tokens=7) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        answer = await client.generate("hello", **GREEDY)
    assert answer.result.completion_tokens == 7
    assert answer.result.finish_reason == "LENGTH"


async def test_a_full_context_ends_with_context(serving):
    async with (
        serving(max_context=32) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        answer = await client.generate(list(range(20)), max_tokens=1000, **GREEDY)
        longest = await client.generate(list(range(31)), max_tokens=1000, **GREEDY)
    assert answer.result.finish_reason == longest.result.finish_reason == "CONTEXT"
    assert (answer.result.completion_tokens, longest.result.completion_tokens) == (12, 1)


@pytest.mark.parametrize("max_context", [2, 3, 5])
async def test_the_smallest_contexts_serve(serving, max_context):
    async with (
        serving(max_context=max_context) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        answer = await client.generate([1], max_tokens=100, **GREEDY)
    assert answer.result.completion_tokens == max_context - 1


async def test_a_report_tells_how_concentrated_the_prompts_neurons_are(wire):
    plain = await wire.inference.Generate(make_request("hello there", max_tokens=2))
    assert plain.sparsity.policy == pb.SPARSITY_POLICY_DENSE
    assert plain.sparsity.density == 1
    assert not plain.sparsity.HasField("core_share")
    request = make_request("hello there", max_tokens=2, report_neurons=True)
    reported = await wire.inference.Generate(request)
    assert 0 < reported.sparsity.core_share < 1
    assert (await events(wire, request))[-1].summary.sparsity == reported.sparsity


@pytest.mark.parametrize("n", [1, 3])
async def test_an_answer_tells_what_its_policy_read(serving, n):
    fields = {"max_tokens": 9, "ignore_eos": True, "n": n, "seed": 3}
    async with serving() as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        dense = (await client.generate("hello there", **fields)).result
        core = await client.generate("hello there", policy="core", density=0.5, **fields)
        streamed = [
            d async for d in client.stream("hello there", policy="core", density=0.5, **fields)
        ]
        info = server.engine.engine.backend.info
    assert (dense.policy, dense.density, dense.dense_share, dense.predicted_kl) == (
        "dense",
        1,
        1,
        0,
    )
    assert (dense.coverage, dense.stable) == (None, None)
    assert dense.mlp_bytes_per_token == info.mlp_bytes
    # over 12 .. 19 positions of KV
    assert dense.bytes_per_token == info.weight_bytes + info.kv_bytes_per_token * 15.5
    result = core.result
    assert (result.policy, result.density, result.dense_share) == ("core", 0.5, 0)
    assert result.mlp_bytes_per_token == info.mlp_bytes / 2
    assert dense.bytes_per_token - result.bytes_per_token == info.mlp_bytes / 2
    assert 0.5 < result.coverage < 1
    assert (result.stable, result.predicted_kl) == (False, None)
    assert (result.refreshes, result.drafted_tokens, result.fallbacks) == (0, 0, 0)
    told = replace(streamed[-1].result, queue_seconds=0, ttft_seconds=0, decode_seconds=0)
    same = {"request_id": told.request_id, "cached_tokens": told.cached_tokens}
    assert told == replace(result, queue_seconds=0, ttft_seconds=0, decode_seconds=0, **same)


async def test_exact_says_what_dense_says_and_counts_its_drafts(client):
    fields = {"max_tokens": 40, "temperature": 0, "ignore_eos": True, "logprobs": True}
    dense = await client.generate("la la la la la", **fields)
    for draft in ("ngram", "core"):
        exact = await client.generate("la la la la la", policy="exact", draft=draft, **fields)
        assert exact.choices == dense.choices
        assert exact.result.policy == "exact"
        assert 0 <= exact.result.accepted_tokens <= exact.result.drafted_tokens
        assert exact.result.drafted_tokens > 0


async def test_a_server_has_a_policy_of_its_own(serving):
    async with (
        serving(default_policy="core", default_density=0.25) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        own = await client.generate("hello there", max_tokens=9)
        dense = await client.generate("hello there", max_tokens=9, policy="dense")
    assert (own.result.policy, own.result.density) == ("core", 0.25)
    assert dense.result.policy == "dense"


async def test_the_asyncio_client_streams_what_it_generates(client):
    fields = {"max_tokens": 30, "token_ids": True, "logprobs": True, **GREEDY}
    whole = await client.generate("hello", **fields)
    pieces = [piece async for piece in client.stream("hello", **fields)]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert sum((piece.token_ids for piece in pieces), ()) == whole.token_ids
    assert sum((piece.logprobs for piece in pieces), ()) == whole.logprobs
    assert [piece.result for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].result.completion_tokens == len(whole.token_ids) == 30


async def test_the_plain_client_gets_the_same_as_the_asyncio_client(server, client):
    fields = {"max_tokens": 30, "token_ids": True, **GREEDY}

    def plain():
        with Client(f"127.0.0.1:{server.port}") as connected:
            pieces = list(connected.stream("hello", **fields))
            infos = [connected.model_info(), connected.server_info(), connected.load()]
            return connected.generate("hello", **fields), pieces, infos

    whole, pieces, infos = await asyncio.to_thread(plain)
    same = await client.generate("hello", **fields)
    assert infos == [await client.model_info(), await client.server_info(), await client.load()]
    assert (whole.text, whole.token_ids) == (same.text, same.token_ids)
    assert "".join(piece.text for piece in pieces) == same.text
    assert pieces[-1].result.finish_reason == same.result.finish_reason == "LENGTH"
    assert infos[0].max_context_length == infos[1].limits.max_context_length == 512


async def test_a_real_model_answers_with_text_that_decodes_from_its_ids(serving, demo_model):
    async with (
        serving(model=demo_model, max_context=512, kv_cache_gib=0.1, threads=0) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        fields = {"max_tokens": 12, "temperature": 0.0, "token_ids": True}
        prompt = "The capital of France is"
        whole = await client.generate(prompt, **fields)
        pieces = [piece async for piece in client.stream(prompt, **fields)]
    assert "Paris" in whole.text
    assert whole.text == server.engine.engine.tokenizer.decode(whole.token_ids)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert sum(1 for piece in pieces if piece.text) > 1
