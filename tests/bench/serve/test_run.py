"""The generator against real servers: our own over gRPC, and one over HTTP."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from statistics import median

import numpy as np
import pytest

from sparserve.bench.serve.datasets import Lengths, Prompt, random_prompts
from sparserve.bench.serve.openai import OpenAi
from sparserve.bench.serve.run import TIMED_OUT, Stage, run_load, warm_up
from sparserve.bench.serve.summary import summarize
from sparserve.bench.serve.targets import Failed, Sparserve, Wish
from sparserve.errors import ConfigError

STALL = 1.0  # seconds


def asks(tokens):
    return lambda number: Prompt([number % 200 + 1, 7], tokens)


async def loaded(target, stage, on_status=lambda status: None):
    await target.open()
    try:
        return await run_load(target, stage, on_status)
    finally:
        await target.close()


async def test_users_send_as_soon_as_they_are_answered(serving, make_load):
    async with serving() as server:
        target = Sparserve([f"127.0.0.1:{server.port}"], Wish(), [os.getpid()])
        await target.open()
        vocabulary = await target.vocabulary()
        await target.close()
        assert vocabulary.ids.max() == 255
        assert vocabulary.max_context == 512
        prompts = random_prompts(vocabulary, Lengths(20, 12, 0.5), seed=1)
        stage = Stage(make_load(users=3, count=24), prompts)
        run = await loaded(target, stage)
    assert len(run.records) == 24
    for number, record in enumerate(run.records):
        asked = prompts(number)
        assert record.error == ""
        assert (record.prompt_tokens, record.output_tokens) == (
            len(asked.prompt),
            asked.output_tokens,
        )
        assert sum(record.tokens) == asked.output_tokens, "the pieces have all of them"
        assert record.scheduled <= record.sent < record.times[0] <= record.times[-1] <= record.ended
        assert record.sparsity.policy == "dense"
    found = summarize([run], (99,), {})
    assert found.peak_concurrency == 3
    assert found.held_back.percentiles["99"] < 500, "a user waits for no turn"
    assert run.cpu_seconds > 0
    assert found.server_rss_mib[1] > 50, "this process is the server here"


async def test_what_other_processes_use_is_told(http_server, make_load):
    """A process that does nothing but count, beside a server that is not the target's process."""
    http_server.seconds_per_token = 0.05
    code = "while True: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as busy:
        try:
            target = OpenAi("peer", http_server.url, Wish(), pids=[os.getpid()])
            run = await loaded(target, Stage(make_load(users=1, count=1), asks(30)))
            others = run.server.cpus_of_others
            target = OpenAi("peer", http_server.url, Wish(), pids=[busy.pid])
            run = await loaded(target, Stage(make_load(users=1, count=1), asks(30)))
        finally:
            busy.kill()
    assert others > 0.05
    assert run.server.cpu_seconds > 0.05, "now it is the server"
    with pytest.raises(ConfigError, match="the server's process"):
        await loaded(OpenAi("peer", http_server.url, Wish(), pids=[2**22 + 1]), Stage(make_load(count=1), asks(1)))  # fmt: skip


async def test_requests_come_when_they_are_due(serving, make_load):
    statuses = []
    async with serving() as server:
        target = Sparserve([f"127.0.0.1:{server.port}"], Wish())
        load = make_load(40.0, seconds=1.2)
        stage = Stage(load, asks(3), seed=(5, 6))
        run = await loaded(target, stage, statuses.append)
    planned = load.arrivals.schedule((5, 6), count=None, duration=1.2)
    assert [record.scheduled for record in run.records] == planned.tolist()
    late = [record.sent - record.scheduled for record in run.records]
    assert min(late) >= 0
    assert median(late) < 0.05
    assert statuses[-1].finished > 10
    assert 0 < statuses[0].share <= 1


async def test_a_run_ends_with_its_duration(serving, make_load):
    async with serving() as server:
        target = Sparserve([f"127.0.0.1:{server.port}"], Wish())
        run = await loaded(target, Stage(make_load(users=2, seconds=0.6), asks(8)))
    assert 0.6 < run.seconds < 10
    assert max(record.sent for record in run.records) < 0.6
    assert all(record.output_tokens == 8 for record in run.records)


async def test_a_stall_of_a_second_shows_in_what_was_due_meanwhile(serving, make_load):
    async with serving() as server:
        target = Sparserve([f"127.0.0.1:{server.port}"], Wish())
        backend = server.engine.engine.backend
        forward, calls = backend.forward, []

        def stall(batch):
            calls.append(time.perf_counter())
            if len(calls) == 20:
                time.sleep(STALL)
            return forward(batch)

        backend.forward = stall
        # One at a time: nothing more is sent while the server stalls.
        stage = Stage(make_load(25.0, users=1, seconds=2.4), asks(1))
        run = await loaded(target, stage)
    stalled = calls[19] - run.records[0].origin
    due = [r for r in run.records if stalled < r.scheduled < stalled + STALL / 2]
    assert len(due) > 3
    for record in due:
        rest = stalled + STALL - record.scheduled
        assert record.ttft >= rest - 0.01
        assert record.e2e >= rest - 0.01
    found = summarize([run], (50, 90), {"ttft": 500.0})
    by_send = [r for r in run.records if r.times[0] - r.sent > STALL / 2]
    assert len(by_send) == 1, "from when they were sent, one request alone was slow"
    assert found.ttft.percentiles["90"] > 500
    assert found.ttft_from_send.percentiles["90"] < 500
    assert found.held_back.percentiles["90"] > 300
    assert found.good_requests_per_second < found.requests_per_second


async def test_several_servers_take_turns(serving, make_load):
    async with serving() as one, serving() as other:
        addresses = [f"127.0.0.1:{server.port}" for server in (one, other)]
        run = await loaded(Sparserve(addresses, Wish()), Stage(make_load(count=10), asks(4)))
        counts = [server.engine.engine.metrics.generation_tokens._value.get() for server in (one, other)]  # fmt: skip
    assert counts == [20, 20]
    assert {record.error for record in run.records} == {""}


async def test_refusals_are_counted_by_status(serving, make_load):
    async with serving(max_running=1, max_waiting=2) as server:
        target = Sparserve([f"127.0.0.1:{server.port}"], Wish())
        run = await loaded(target, Stage(make_load(count=12), asks(40)))
    found = summarize([run], (99,), {})
    assert found.failures.keys() == {"RESOURCE_EXHAUSTED"}
    assert found.completed >= 3
    assert found.completed + found.failed == 12
    assert "queue is full" in next(r.message for r in run.records if r.error)


async def test_what_cannot_be_sent_fails_too(serving, make_load):
    async with serving() as server:
        for policy, status in (("nonsense", "INVALID_REQUEST"), ("token", "FAILED_PRECONDITION")):
            target = Sparserve([f"127.0.0.1:{server.port}"], Wish(fields={"policy": policy}))
            run = await loaded(target, Stage(make_load(count=1), asks(2)))
            assert run.records[0].error == status


async def test_what_is_asked_for_is_reported(serving, tiny_index, make_load):
    async with serving(index=str(tiny_index)) as server:
        wish = Wish(fields={"policy": "core", "density": 0.5, "draft": None})
        target = Sparserve([f"127.0.0.1:{server.port}"], wish)
        run = await loaded(target, Stage(make_load(users=2, count=4), lambda n: Prompt([n] * 40, 9)))  # fmt: skip
    quality = summarize([run], (99,), {}).quality
    assert quality.policies == {"core": 4}
    assert quality.density == pytest.approx(0.5, abs=0.05)
    assert quality.predicted_kl == pytest.approx(0.4)


async def test_a_server_that_is_not_there_is_told():
    with pytest.raises(ConfigError, match=r"sparserve at 127.0.0.1:1 does not answer: UNAVAILABLE"):
        await Sparserve(["127.0.0.1:1"], Wish()).open()


async def test_a_server_that_ends_fails_by_its_status(serving, make_load):
    async with serving() as server:
        target = Sparserve([f"127.0.0.1:{server.port}"], Wish())
        await target.open()
        assert target.model.endswith(", float32")
    with pytest.raises(Failed, match="UNAVAILABLE"):
        await warm_up(target, asks(2), 1, 30)
    run = await run_load(target, Stage(make_load(count=2), asks(2)))
    assert [record.error for record in run.records] == ["UNAVAILABLE"] * 2
    await target.close()


async def test_streams_over_http_are_timed_by_piece(http_server, make_load):
    http_server.seconds_per_token = 0.02
    target = OpenAi("peer", http_server.url + "/v1", Wish())
    run = await loaded(target, Stage(make_load(users=2, count=4), asks(6)))
    assert [record.output_tokens for record in run.records] == [6] * 4
    assert [record.prompt_tokens for record in run.records] == [2] * 4
    assert {len(record.times) for record in run.records} == {6}
    assert np.median([gap for record in run.records for gap in record.gaps]) > 0.015
    assert target.counted_by == "the server's usage"
    body = http_server.bodies[0]
    assert body["model"] == "a model"
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert sorted(each["prompt"][0] for each in http_server.bodies) == [1, 2, 3, 4]


async def test_chunks_are_tokens_where_no_usage_comes(http_server, make_load):
    http_server.usage = False
    target = OpenAi("peer", http_server.url, Wish(stop_at_eos=True), model="own")
    run = await loaded(target, Stage(make_load(count=3), asks(5)))
    assert [record.output_tokens for record in run.records] == [5] * 3
    assert target.counted_by == "chunks"
    assert {(body["model"], body["ignore_eos"]) for body in http_server.bodies} == {("own", False)}


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({"status": 429}, "HTTP 429"),
        ({"tail": ""}, "INCOMPLETE"),
        ({"tail": "data: {no\n\n"}, "BAD_CHUNK"),
        ({"tail": "data: 3\n\n"}, "BAD_CHUNK"),
        ({"tail": 'data: {"error": "lost"}\n\ndata: [DONE]\n\n'}, "ERROR_EVENT"),
        ({"tail": 'data: {"usage": {"prompt_tokens": "x"}}\n\n'}, "BAD_CHUNK"),
    ],
)
async def test_what_goes_wrong_over_http_has_a_status(http_server, make_load, settings, status):
    for name, value in settings.items():
        setattr(http_server, name, value)
    run = await loaded(OpenAi("peer", http_server.url, Wish()), Stage(make_load(count=2), asks(3)))
    assert [record.error for record in run.records] == [status] * 2


async def test_a_connection_that_is_lost_fails_by_name(http_server, make_load):
    target = OpenAi("peer", "http://127.0.0.1:1", Wish(), model="any")
    run = await loaded(target, Stage(make_load(count=1), asks(3)))
    assert run.records[0].error == "ConnectError"
    with pytest.raises(ConfigError, match="names no model"):
        await loaded(OpenAi("peer", "http://127.0.0.1:1", Wish()), Stage(make_load(count=1), asks(3)))  # fmt: skip
    for url in ("127.0.0.1:1", "http://", "http://h:x"):
        with pytest.raises(ConfigError, match="is no address"):
            OpenAi("peer", url, Wish())


async def test_a_request_that_takes_too_long_is_given_up(http_server, make_load):
    http_server.stall = (1, 1.0)
    target = OpenAi("peer", http_server.url, Wish())
    stage = Stage(make_load(users=1, count=2), asks(2), timeout=0.2)
    run = await loaded(target, stage)
    assert [record.error for record in run.records] == ["", TIMED_OUT]
    assert run.records[1].e2e == pytest.approx(0.2, abs=0.15)


async def test_the_lateness_of_the_own_loop_is_measured(http_server, make_load):
    """Something that holds the event loop for a fifth of a second, as a generator too slow for its load would."""
    target = OpenAi("peer", http_server.url, Wish())
    http_server.seconds_per_token = 0.05

    def hold():
        time.sleep(0.2)

    loop = asyncio.get_running_loop()
    timer = threading.Timer(0.3, lambda: loop.call_soon_threadsafe(hold))
    timer.start()
    run = await loaded(target, Stage(make_load(users=1, count=1), asks(12)))
    timer.join()
    assert 0.1 < max(run.lags) < 1
    assert median(run.lags) < 0.1
