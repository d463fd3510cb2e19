"""All targets under all loads, by turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from sparse_kernels.native import NativeCallError, NativeLibraryError, read_probe
from sparserve.bench.serve.datasets import STAGE_PROMPTS, Prompts
from sparserve.bench.serve.load import Load
from sparserve.bench.serve.records import Run
from sparserve.bench.serve.report import Plan, Report, make_report
from sparserve.bench.serve.run import Stage, Status, run_load, warm_up
from sparserve.bench.serve.summary import Summary, summarize
from sparserve.bench.serve.targets import Failed, Target
from sparserve.errors import ConfigError

PROBE_BYTES = 256 << 20  # well above any last-level cache that matters here

OnStatus = Callable[[str, Status], None]
OnRun = Callable[[str, Summary], None]


async def measure(
    targets: Sequence[Target],
    prompts: Prompts,
    plan: Plan,
    on_status: OnStatus = lambda what, status: None,
    on_run: OnRun = lambda what, summary: None,
) -> Report:
    """Every round takes each load in turn, on each target, and begins with another target. `on_run` is told of each
    that has ended.

    Raises ConfigError or SparserveError where a target does not answer at all.
    """
    runs: dict[tuple[int, int], list[Run]] = {
        (place, index): [] for index in range(len(plan.loads)) for place in range(len(targets))
    }
    ceilings: list[float] = []
    async with _opened(targets):
        for target in targets:
            await _warm_up(target, prompts, plan)
        for turn in range(plan.rounds):
            ceilings += await asyncio.to_thread(_read_ceiling)
            for index, load in enumerate(plan.loads):
                # Targets share a stage's prompts; what the last stage asked, a prefix cache would know.
                number = 1 + turn * len(plan.loads) + index
                stage = Stage(
                    load, prompts, number * STAGE_PROMPTS, (plan.seed, number), plan.timeout
                )
                for step in range(len(targets)):
                    place = (turn + index + step) % len(targets)
                    target = targets[place]
                    what = _title(target.name, load, turn, plan.rounds)
                    found = await run_load(target, stage, partial(on_status, what))
                    runs[place, index].append(found)
                    on_run(what, summarize([found], plan.percentiles, plan.slos))
        told = [
            {"name": t.name, "address": t.address, "model": t.model, "counted_by": t.counted_by}
            for t in targets
        ]
    return make_report(told, plan, runs, ceilings)


async def _warm_up(target: Target, prompts: Prompts, plan: Plan) -> None:
    try:
        await warm_up(target, prompts, plan.warmup, plan.timeout)
    except Failed as error:
        raise ConfigError(f"{target.name} at {target.address} fails to answer: {error}") from error


@asynccontextmanager
async def _opened(targets: Sequence[Target]) -> AsyncIterator[None]:
    opened: list[Target] = []
    try:
        for target in targets:
            await target.open()
            opened.append(target)
        yield
    finally:
        for target in opened:
            await target.close()


def _title(name: str, load: Load, turn: int, rounds: int) -> str:
    return f"{name}, {load.label}" + (f", round {turn + 1} of {rounds}" if rounds > 1 else "")


def _read_ceiling() -> list[float]:
    """GB/s of this machine; [] where the kernels are not there."""
    try:
        return [read_probe(buffer_bytes=PROBE_BYTES, seconds=0.3).gb_per_s]
    except (NativeLibraryError, NativeCallError):
        return []
