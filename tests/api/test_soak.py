"""Ten minutes of users who leave, time out and vanish, on the demo model, leave nothing behind.

`SPARSERVE_SOAK_SECONDS` makes it shorter or longer.
"""

import asyncio
import os
import random
import time
from collections import Counter

import psutil
import pytest

from sparserve.client import AsyncClient
from sparserve.errors import CallFailed

SECONDS = float(os.environ.get("SPARSERVE_SOAK_SECONDS", "600"))
STREAMS = 8
ENDINGS = ["read on"] * 5 + ["cancel", "cancel", "deadline", "disconnect", "abort"]
STEMS = ["Tell me about the sea. ", "Write a list of animals. ", "Explain how a clock works. "]


def random_options(source: random.Random) -> dict[str, object]:
    """Keywords of a request."""
    choices = [
        {},
        {"temperature": 1.0, "n": 2},
        {"repetition_penalty": 1.2, "top_logprobs": 3},
        {"regex": "[a-z ]{5,40}"},
        {"json_object": True},
        {"prompt_logprobs": 1},
        {"stop": ["the"], "min_p": 0.05},
    ]
    return {
        "max_tokens": source.randint(2, 40),
        "seed": source.randrange(1000),
        "token_ids": True,
        **source.choice(choices),
    }


async def one_request(target: str, source: random.Random, name: str, counts: Counter[str]) -> None:
    prompt = source.choice(STEMS) * source.randint(1, 20)
    options = {**random_options(source), "request_id": name}
    ending = source.choice(ENDINGS)
    stop_after = source.randint(0, 12)  # pieces
    async with AsyncClient(target) as client:
        if ending == "deadline":
            options["timeout"] = source.uniform(0.01, 1.5)
        stream, pieces = client.stream(prompt, **options), 0
        try:
            async for piece in stream:
                counts["tokens"] += len(piece.token_ids)
                pieces += 1
                if pieces <= stop_after:
                    continue
                if ending == "cancel":
                    break
                if ending == "disconnect":
                    await client.close()
                if ending == "abort":
                    await client.abort(name)
            counts[ending] += 1
        except CallFailed as error:
            expected = {"deadline": "DEADLINE_EXCEEDED", "disconnect": "CANCELLED"}
            if error.code != expected.get(ending):
                raise
            counts[f"{ending}: {error.code}"] += 1
        except asyncio.CancelledError:  # what a closed channel does to its calls
            assert ending == "disconnect"
            counts["disconnect: cancelled"] += 1
        finally:
            await stream.aclose()


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 240)
async def test_users_who_leave_time_out_and_vanish_leave_nothing_behind(
    serving, demo_model, until, record_property
):
    process = psutil.Process()
    settings = {
        "max_context": 1024, "kv_cache_gib": 0.25, "threads": 0, "max_running": STREAMS,
        "default_max_tokens": 40,
    }  # fmt: skip
    counts: Counter[str] = Counter()
    memory: list[tuple[float, float]] = []
    async with serving(model=demo_model, **settings) as server:
        target = f"127.0.0.1:{server.port}"
        tasks_before = len(asyncio.all_tasks())
        begun = time.monotonic()
        end = begun + SECONDS

        async def user(number: int) -> None:
            source, asked = random.Random(number), 0
            while time.monotonic() < end:
                await one_request(target, source, f"user {number} request {asked}", counts)
                asked += 1

        async def watch() -> None:
            while time.monotonic() < end:
                memory.append((time.monotonic() - begun, process.memory_info().rss / 2**20))
                await asyncio.sleep(1)

        await asyncio.gather(watch(), *(user(n) for n in range(STREAMS)))
        await until(lambda: server.engine.in_flight == 0)
        engine = server.engine.engine
        await until(lambda: engine.num_running == engine.num_waiting == engine.used_blocks == 0)
        await until(lambda: len(asyncio.all_tasks()) <= tasks_before, "the tasks are gone")
        assert server.is_ready
        assert engine.metrics.step_failures._value.get() == 0
    warm = max(rss for at, rss in memory if SECONDS / 4 <= at < SECONDS / 2)
    late = max(rss for at, rss in memory if at >= SECONDS * 3 / 4)
    for name, value in {**counts, "RSS warm MiB": warm, "RSS late MiB": late}.items():
        record_property(name, value)
        print(f"{name}: {value:.0f}")
    assert sum(counts[ending] for ending in ENDINGS) >= STREAMS
    assert late < warm * 1.03 + 10
