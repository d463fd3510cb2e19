"""A minute of load on the demo model leaves nothing behind."""

import asyncio
import random
import time

import psutil
import pytest

from sparserve.client import AsyncClient

SECONDS = 60
STREAMS = 8


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 240)
async def test_eight_streams_for_a_minute_leave_no_request_block_task_or_memory_behind(
    serving, demo_model, until, record_property
):
    process = psutil.Process()
    settings = {"max_context": 1024, "kv_cache_gib": 0.25, "threads": 0, "max_running": STREAMS}
    async with serving(model=demo_model, **settings) as server:
        target = f"127.0.0.1:{server.port}"
        tasks_before = len(asyncio.all_tasks())
        counts = {"requests": 0, "tokens": 0, "left early": 0}
        memory: list[tuple[float, float]] = []

        async def user(number: int, end: float) -> None:
            """Prompts of many lengths, some streams left half-way, as real users do."""
            source = random.Random(number)
            async with AsyncClient(target) as client:
                while time.monotonic() < end:
                    prompt = "Tell me about the sea. " * source.randint(1, 20)
                    length, leave = source.randint(4, 40), source.random() < 0.2
                    stream = client.stream(prompt, max_tokens=length, token_ids=True)
                    async for piece in stream:
                        counts["tokens"] += len(piece.token_ids)
                        if leave and piece.token_ids:
                            counts["left early"] += 1
                            break
                    await stream.aclose()
                    counts["requests"] += 1

        async def watch(begun: float, end: float) -> None:
            while time.monotonic() < end:
                memory.append((time.monotonic() - begun, process.memory_info().rss / 2**20))
                await asyncio.sleep(1)

        begun = time.monotonic()
        end = begun + SECONDS
        await asyncio.gather(watch(begun, end), *(user(n, end) for n in range(STREAMS)))
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
    assert counts["requests"] >= STREAMS
    assert late < warm * 1.03 + 10
