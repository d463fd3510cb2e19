"""Limits of keys: what is counted, what a refusal says, and that who comes back when told gets in."""

import asyncio
import math
import time
from contextlib import suppress

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparserve.api.security import guard
from sparserve.api.security.keys import append_key, new_key
from sparserve.api.security.limits import Limits, Quota
from sparserve.client import AsyncClient, make_request
from sparserve.errors import CallFailed, InvalidRequest, KeyLimitReached

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
def limited(serving, tmp_path, monkeypatch):
    """`async with limited({"concurrent": 1}, setting=…) as (server, client)`: a key with these limits."""
    monkeypatch.setattr(guard, "RELOAD_SECONDS", 0.02)

    class Limited:
        path = tmp_path / "keys.yaml"

        def __init__(self, limits, **settings):
            key, line = new_key({"name": "ann", **limits})
            append_key(self.path, "ann", line)
            self._serving = serving(api_keys=str(self.path), **settings)
            self._key = key

        async def __aenter__(self):
            self._server = await self._serving.__aenter__()
            target = f"127.0.0.1:{self._server.port}"
            self._client = AsyncClient(target, api_key=self._key)
            return self._server, self._client

        async def __aexit__(self, *error):
            await self._client.close()
            await self._serving.__aexit__(*error)

    return Limited


async def refusal_of(call, details_of, limit: str, value: int) -> float:
    """Seconds that a refused call was told to wait; checks all else that it was told."""
    with pytest.raises(CallFailed) as refused:
        await call
    error = refused.value.__cause__
    assert error.code() is EXHAUSTED
    details = details_of(error)
    (violation,) = details["QuotaFailure"].violations
    assert (violation.subject, violation.quota_metric) == ("key:ann", limit)
    assert violation.quota_value == value
    assert str(value) in violation.description
    assert limit in violation.description
    wait = details["RetryInfo"].retry_delay.ToMilliseconds() / 1000
    assert wait == refused.value.retry_after > 0
    return wait


async def test_requests_a_minute_are_a_burst_and_then_a_rate(limited, details_of):
    limit = 240  # four a second
    async with limited({"requests_per_minute": limit}) as (server, client):
        begun = time.monotonic()
        for _ in range(limit):
            await client.tokenize("x")
        taken = limit
        with suppress(CallFailed):
            for _ in range(limit):
                await client.tokenize("x")
                taken += 1
        elapsed = time.monotonic() - begun
        assert taken <= limit + 4 * elapsed + 1
        wait = await refusal_of(client.tokenize("x"), details_of, "requests_per_minute", limit)
        assert wait <= 0.25
        assert await client.list_models()  # is none of those that count
        await asyncio.sleep(wait)
        await client.tokenize("x")
        counted = server.engine.engine.metrics.api_key_limited.labels(key="ann")
        assert counted._value.get() == 2


async def test_tokens_a_minute_count_prompts_and_what_is_generated(limited, details_of):
    limit = 1200  # twenty a second
    async with limited({"tokens_per_minute": limit}) as (server, client):
        begun = time.monotonic()
        for letter in "abc":
            await client.generate(letter * 300, max_tokens=1, ignore_eos=True)
        fields = {"max_tokens": 150, "n": 2, "ignore_eos": True}
        streamed = [piece async for piece in client.stream("d" * 10, **{**fields, "n": 1})]
        assert streamed[-1].result.completion_tokens == 150
        # 300 + 1 three times, 10 + 150: 137 are left, of which the next takes 110 and owes the rest.
        await client.generate("e" * 10, **{**fields, "max_tokens": 100})
        elapsed = time.monotonic() - begun
        owed = 3 * 301 + 160 + 210 - limit
        wait = await refusal_of(client.generate("f"), details_of, "tokens_per_minute", limit)
        assert (owed + 1) / 20 - elapsed - 0.1 <= wait <= (owed + 1) / 20
        assert (await client.tokenize("not counted")).token_ids
        await asyncio.sleep(wait)
        await client.generate("f", max_tokens=1)
        counted = server.engine.engine.metrics.api_key_tokens.labels(key="ann")
        assert counted._value.get() >= limit + owed


async def test_a_prompt_that_cannot_begin_yet_is_charged_nothing(limited, details_of):
    async with limited({"tokens_per_minute": 400}) as (_, client):
        await client.generate("x" * 200, max_tokens=1)
        # What is left is enough for the next, and not for the one after.
        for _ in range(3):
            await refusal_of(client.generate("y" * 300), details_of, "tokens_per_minute", 400)
        await client.generate("z" * 150, max_tokens=1)


async def test_a_prompt_above_the_limit_waits_for_a_whole_minutes_worth(limited, details_of):
    async with limited({"tokens_per_minute": 100}) as (_, client):
        assert (await client.generate("x" * 300, max_tokens=1)).result.prompt_tokens == 300
        wait = await refusal_of(client.generate("y"), details_of, "tokens_per_minute", 100)
        assert 119 < wait < 122


async def test_a_request_that_the_engine_refuses_is_charged_nothing(
    limited, controlled, until, details_of
):
    async with limited({"tokens_per_minute": 400}, max_running=1, max_waiting=0) as (
        server,
        client,
    ):
        with controlled(server) as forward:
            forward.hold()
            first = asyncio.ensure_future(client.generate("x" * 200, max_tokens=1))
            await until(lambda: server.engine.in_flight == 1)
            with pytest.raises(CallFailed, match="the queue is full"):
                await client.generate("y" * 150)
        await first
        with pytest.raises(CallFailed, match="INVALID_ARGUMENT"):
            await client.generate("y" * 600)
        await client.generate("z" * 150, max_tokens=1)


ENDINGS = ("success", "cancel", "deadline", "failure", "invalid")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_place_among_the_calls_at_once_is_free_again_however_one_ends(
    limited, controlled, until, details_of, ending, streaming
):
    async def whole(timeout=None, **fields):
        if not streaming:
            return await client.generate("x", timeout=timeout, **fields)
        return [piece async for piece in client.stream("x", timeout=timeout, **fields)]

    async with limited({"concurrent": 1}) as (server, client):
        with controlled(server) as forward:
            forward.hold()
            fields = {"max_tokens": 2, "ignore_eos": True}
            if ending == "invalid":
                with pytest.raises(CallFailed, match="INVALID_ARGUMENT"):
                    await whole(temperature=9)
            else:
                timeout = 0.3 if ending == "deadline" else None
                first = asyncio.ensure_future(whole(timeout, **fields))
                await until(lambda: server.engine.in_flight == 1)
                await refusal_of(whole(**fields), details_of, "concurrent", 1)
                if ending == "cancel":
                    first.cancel()
                elif ending == "failure":
                    forward.fail(RuntimeError("broken"), times=1)
                if ending != "deadline":
                    forward.release()
                await asyncio.wait({first})
                assert first.cancelled() == (ending == "cancel")
                assert ending in ("success", "cancel") or isinstance(first.exception(), CallFailed)
            forward.release()
            (quota,) = server._guard.interceptors[0]._quotas.values()
            await until(lambda: quota._running == 0, "the place")
            await whole(**fields)


async def test_keys_have_the_servers_limits_where_they_say_nothing(limited, details_of):
    """And 0 of their own is none."""
    defaults = {"key_rpm": 2, "key_tpm": 100, "key_concurrent": 1}
    async with limited({"requests_per_minute": 0}, **defaults) as (_, client):
        for _ in range(5):
            await client.tokenize("x")
        await client.generate("x" * 150, max_tokens=1)
        await refusal_of(client.generate("y"), details_of, "tokens_per_minute", 100)


async def test_limits_change_with_the_file_and_what_was_used_stays_used(limited, until, details_of):
    async with limited({"tokens_per_minute": 200}) as (server, client):
        await client.generate("x" * 200, max_tokens=1)
        await refusal_of(client.generate("y" * 100), details_of, "tokens_per_minute", 200)
        path = limited.path
        before = path.read_text()
        path.write_text(before.replace("200}", "250}"))
        (quota,) = server._guard.interceptors[0]._quotas.values()
        await until(lambda: quota.limits.tokens_per_minute == 250)
        await refusal_of(client.generate("y" * 100), details_of, "tokens_per_minute", 250)
        await client.generate("y" * 40, max_tokens=1)  # of the 50 more
        path.write_text(before.replace(", tokens_per_minute: 200}", "}"))
        await until(lambda: quota.limits.tokens_per_minute == 0)
        await client.generate("y" * 300, max_tokens=1)


async def test_wrong_requests_are_refused_by_the_client_before_they_count(limited):
    async with limited({"requests_per_minute": 1}) as (_, client):
        with pytest.raises(InvalidRequest):
            await client.generate("x", temperature="hot")
        await client.tokenize("x")
        with pytest.raises(CallFailed, match="requests_per_minute"):
            await client.tokenize("x")
    assert make_request("x").text == "x"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), max_size=60),
)
def test_no_minute_has_more_requests_than_twice_the_limit_and_the_rate_holds(limit, arrivals):
    """A full bucket and what comes in meanwhile; and whoever waits as told gets in."""
    clock = Clock()
    quota = Quota("ann", Limits(requests_per_minute=limit), clock)
    taken = []
    for pause, calls in arrivals:
        clock.now += pause
        for _ in range(calls):
            try:
                quota.begin()
            except KeyLimitReached as refused:
                clock.now += refused.retry_after
                quota.begin()
            taken.append(clock.now)
    for i, begun in enumerate(taken):
        for count, at in enumerate(taken[i:], 1):
            assert count <= limit + (at - begun) * limit / 60 + 1 + 1e-3


@given(
    st.integers(1, 100_000),
    st.lists(st.tuples(st.floats(0, 1000), st.integers(1, 5000), st.integers(0, 5000)), max_size=40),
)  # fmt: skip
def test_tokens_are_never_lost_nor_made(limit, requests):
    clock = Clock()
    quota = Quota("ann", Limits(tokens_per_minute=limit), clock)
    level = float(limit)
    for pause, prompt, output in requests:
        clock.now += pause
        level = min(level + pause * limit / 60, limit)
        needed = min(prompt, limit)
        try:
            quota.check_tokens(prompt)
        except KeyLimitReached as refused:
            wait = refused.retry_after
        else:
            wait = 0.0
        assert wait == pytest.approx(max(needed - level, 0) / limit * 60, abs=0.002)
        if wait:
            clock.now += wait
            level = min(level + wait * limit / 60, limit)
            quota.check_tokens(prompt)
        assert level >= needed - 1e-3
        quota.charge(prompt)
        quota.charge(output)
        level -= prompt + output


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(0, 1000))
def test_a_changed_limit_keeps_what_was_used(before, after, used):
    clock = Clock()
    quota = Quota("ann", Limits(tokens_per_minute=before), clock)
    quota.charge(used)
    quota.change(Limits(tokens_per_minute=after))
    left = after - used
    if left >= 1:
        quota.check_tokens(left)
        quota.charge(left)
        with pytest.raises(KeyLimitReached):
            quota.check_tokens()
    else:
        with pytest.raises(KeyLimitReached) as refused:
            quota.check_tokens()
        assert math.isfinite(refused.value.retry_after)
