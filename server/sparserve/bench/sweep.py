"""Decode and prefill speed over formats, batch sizes and contexts: all systems alternated in one run.

The byte bound of a step is the time to read, at the memory-read ceiling, every weight once (of the
embedding one row) and the KV of all sequences. The ceiling is measured in every round, over a buffer as
large as the step reads, by as many threads as the systems have.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

from sparse_kernels._abi import SK_READ_PROBE_BLOCK_BYTES
from sparse_kernels.native import read_probe
from sparserve import __version__
from sparserve.bench.machine import CpuWatch, describe_machine
from sparserve.bench.rounds import BenchProgress, fresh_prompts, take_turns, wait_until_idle
from sparserve.bench.systems import Prompts, Run, System, bits, data_type

PROBE_SECONDS = 0.3
WARM_UP_TOKENS = 4

Phase = Literal["decode", "prefill"]


@dataclass(frozen=True, slots=True)
class Plan:
    phase: Phase
    batches: Sequence[int]
    contexts: Sequence[int]  # prompt tokens
    new_tokens: int  # for each prompt; 1 in prefill
    rounds: int
    seed: int = 0

    @property
    def longest(self) -> int:
        """Positions that a sequence takes at most."""
        return max(self.contexts) + self.new_tokens


@dataclass(frozen=True, slots=True)
class Row:
    """One system at one point; medians over the rounds."""

    system: str
    model: str
    format: str
    batch: int
    context: int  # prompt tokens
    new_tokens: int
    # Decode: of all sequences together, after each prompt's first token. Prefill: of the prompts.
    tokens_per_second: float
    tokens_per_second_low: float  # of the slowest round
    tokens_per_second_high: float
    read_ceiling_gb_s: float
    byte_bound_tokens_per_second: float  # at that ceiling
    # Median of the rounds' own; each has its own ceiling. Prefill is bound by arithmetic, far below it.
    percent_of_byte_bound: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """Our speed over a peer's of the same bits at one point: median of the rounds' own; above 1 we are
    faster.
    """

    format: str  # ours
    peer: str
    peer_format: str
    batch: int
    context: int
    ratio: float
    ratio_low: float  # of our worst round
    ratio_high: float


@dataclass(frozen=True, slots=True)
class Report:
    version: str
    time: str
    machine: str
    threads: int
    cpus_used_by_others: float  # on average while it was measured; see `machine.CpuWatch`
    backends: dict[str, str]  # our formats -> the backend that ran them
    plan: Plan
    rows: list[Row]
    ratios: list[Ratio]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run_sweep(
    ours: Sequence[System],
    peers: Sequence[System],
    plan: Plan,
    *,
    model: str,
    vocab_size: int,
    threads: int,
    backends: dict[str, str],
    on_progress: BenchProgress,
) -> Report:
    """Measure every system at every batch size and context of `plan`."""
    source = random.Random(plan.seed)
    systems = [*ours, *peers]
    points = [_Point(plan, batch, context) for batch in plan.batches for context in plan.contexts]
    total, runs = len(points) * len(systems) * (plan.rounds + 1), itertools.count(1)
    on_progress(plan.phase, 0, total)
    watch = CpuWatch()
    rows: list[Row] = []
    ratios: list[Ratio] = []
    for point in points:
        series = _measure(
            systems,
            point,
            threads,
            partial(fresh_prompts, source, vocab_size, point.batch, point.context),
            lambda: on_progress(plan.phase, next(runs), total),
        )
        rows += [found.row(model, point) for found in series]
        mine, theirs = series[: len(ours)], series[len(ours) :]
        ratios += [_ratio(a, b, point) for a in mine for b in theirs if _comparable(a, b, mine)]
    return Report(
        version=__version__,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        threads=threads,
        cpus_used_by_others=round(watch.others(), 2),
        backends=backends,
        plan=plan,
        rows=rows,
        ratios=ratios,
    )


@dataclass(frozen=True, slots=True)
class _Point:
    plan: Plan
    batch: int
    context: int

    @property
    def tokens_per_step(self) -> int:
        """That one pass over the weights makes, or reads."""
        return self.batch * (1 if self.plan.phase == "decode" else self.context)

    def step_bytes(self, system: System) -> int:
        """That such a pass must read; in decode the one in the middle of the new tokens."""
        positions = self.context + (self.plan.new_tokens // 2 if self.plan.phase == "decode" else 0)
        return system.weight_bytes + self.batch * positions * system.kv_bytes_per_token

    def tokens_per_second(self, run: Run) -> float:
        if self.plan.phase == "decode":
            return run.decode_tokens_per_second
        return self.batch * self.context / run.ttft


@dataclass(frozen=True, slots=True)
class _Series:
    """What the rounds gave for one system at one point."""

    system: System
    speeds: list[float]  # tokens a second
    ceilings: list[float]  # GB/s

    def row(self, model: str, point: _Point) -> Row:
        bytes_per_token = point.step_bytes(self.system) / point.tokens_per_step
        bounds = [ceiling * 1e9 / bytes_per_token for ceiling in self.ceilings]
        shares = [speed / bound for speed, bound in zip(self.speeds, bounds, strict=True)]
        return Row(
            system=self.system.name,
            model=model,
            format=self.system.format,
            batch=point.batch,
            context=point.context,
            new_tokens=point.plan.new_tokens,
            tokens_per_second=round(statistics.median(self.speeds), 2),
            tokens_per_second_low=round(min(self.speeds), 2),
            tokens_per_second_high=round(max(self.speeds), 2),
            read_ceiling_gb_s=round(statistics.median(self.ceilings), 1),
            byte_bound_tokens_per_second=round(statistics.median(bounds), 2),
            percent_of_byte_bound=round(100 * statistics.median(shares), 1),
        )


def _measure(
    systems: Sequence[System],
    point: _Point,
    threads: int,
    prompts: Callable[[], Prompts],
    on_run: Callable[[], None],
) -> list[_Series]:
    new_tokens, rounds = point.plan.new_tokens, point.plan.rounds
    # At the size that is measured: some systems compile for each shape that they meet.
    take_turns(systems, 0, prompts(), min(new_tokens, WARM_UP_TOKENS), on_run)
    found = [_Series(system, [], []) for system in systems]
    for turn in range(rounds):
        wait_until_idle()
        ceilings = _read_ceilings([point.step_bytes(system) for system in systems], threads)
        runs = take_turns(systems, turn, prompts(), new_tokens, on_run)
        for series, run, ceiling in zip(found, runs, ceilings, strict=True):
            series.speeds.append(point.tokens_per_second(run))
            series.ceilings.append(ceiling)
    return found


def _read_ceilings(sizes: Sequence[int], threads: int) -> list[float]:
    """GB/s over a buffer of each size; sizes that differ by a few percent share one measurement."""
    known: dict[int, float] = {}
    ceilings = []
    for size in (max(size, threads * SK_READ_PROBE_BLOCK_BYTES) for size in sizes):
        near = next((other for other in known if abs(other - size) < 0.05 * size), size)
        if near not in known:
            probe = read_probe(buffer_bytes=size, threads=threads, seconds=PROBE_SECONDS)
            known[near] = probe.gb_per_s
        ceilings.append(known[near])
    return ceilings


def _comparable(ours: _Series, peer: _Series, all_ours: Sequence[_Series]) -> bool:
    """At the same data type, or where we were not measured in the peer's, at the same bits."""
    theirs = peer.system.format
    if theirs in [data_type(series.system.format) for series in all_ours]:
        return theirs == data_type(ours.system.format)
    return bits(theirs) == bits(ours.system.format)


def _ratio(ours: _Series, peer: _Series, point: _Point) -> Ratio:
    ratios = [a / b for a, b in zip(ours.speeds, peer.speeds, strict=True)]
    return Ratio(
        format=ours.system.format,
        peer=peer.system.name,
        peer_format=peer.system.format,
        batch=point.batch,
        context=point.context,
        ratio=round(statistics.median(ratios), 3),
        ratio_low=round(min(ratios), 3),
        ratio_high=round(max(ratios), 3),
    )
