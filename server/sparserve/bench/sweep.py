"""Decode and prefill speed over formats, batch sizes and contexts: all systems alternated in one run.

The byte bound of a step is the time to read, at the memory-read ceiling, every weight once (of the
embedding one row) and the KV of all sequences. The ceiling is measured in every round, over a buffer as
large as the step reads, by as many threads as the systems have. Where decoded tokens choose neurons, a step reads what was counted.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from sparse_kernels._abi import SK_READ_PROBE_BLOCK_BYTES
from sparse_kernels.native import read_probe
from sparserve import __version__
from sparserve.bench.machine import CpuWatch, describe_machine
from sparserve.bench.rounds import BenchProgress, median_ratio, take_turns, wait_until_idle
from sparserve.bench.systems import DENSE_POLICY, Prompts, Run, System, bits, data_type

if TYPE_CHECKING:
    from sparserve.bench.reads import Reads

PROBE_SECONDS = 0.3
WARM_UP_TOKENS = 4

Phase = Literal["decode", "prefill"]
# (source, how many, tokens in each) -> prompts
PromptMaker = Callable[[random.Random, int, int], Prompts]


@dataclass(frozen=True, slots=True)
class Plan:
    phase: Phase
    batches: Sequence[int]
    contexts: Sequence[int]  # prompt tokens
    new_tokens: int  # for each prompt; 1 in prefill
    rounds: int
    seed: int = 0
    # File that prompts are pieces of; "": random ids or, where a policy chooses neurons, a page of our own.
    text: str = ""

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
    policy: str
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
    bytes_per_token: int  # of weights and KV, read together for one token; see `Reads`
    # Of our decode rows, else None; see `Reads`.
    density: float | None
    union: float | None
    # Of a policy, against the same format dense: of the time that reading less allows to save, the share that
    # is saved, see `share_of_allowed_time`; and how often as fast. Medians of the rounds' own.
    share_of_allowed_time: float | None
    against_dense: float | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """Our speed over a peer's of the same bits at one point: median of the rounds' own; above 1 we are
    faster.
    """

    format: str  # ours
    policy: str
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
    prompts: PromptMaker,
    threads: int,
    backends: dict[str, str],
    on_progress: BenchProgress,
) -> Report:
    """Measure every system at every batch size and context of `plan`."""
    source = random.Random(plan.seed)
    systems = [*ours, *peers]
    points = [Point(plan, batch, context) for batch in plan.batches for context in plan.contexts]
    total, runs = len(points) * len(systems) * (plan.rounds + 1), itertools.count(1)
    on_progress(plan.phase, 0, total)
    watch = CpuWatch()
    rows: list[Row] = []
    ratios: list[Ratio] = []
    for point in points:
        series = measure_point(
            systems,
            point,
            threads,
            partial(prompts, source, point.batch, point.context),
            lambda: on_progress(plan.phase, next(runs), total),
        )
        mine, theirs = series[: len(ours)], series[len(ours) :]
        rows += [found.row(model, point, _dense_of(found, mine)) for found in mine]
        rows += [found.row(model, point, None) for found in theirs]
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
class Point:
    plan: Plan
    batch: int
    context: int

    @property
    def tokens_per_step(self) -> int:
        """That one pass over the weights makes, or reads."""
        return self.batch * (1 if self.plan.phase == "decode" else self.context)

    def bytes_per_token(self, system: System, reads: Reads | None) -> float:
        """Read together for one token; in decode for one in the middle of the new tokens."""
        positions = self.context + (self.plan.new_tokens // 2 if self.plan.phase == "decode" else 0)
        kv_bytes = positions * system.kv_bytes_per_token
        if reads is not None:
            return reads.weight_bytes + reads.passes * kv_bytes
        return (system.weight_bytes + self.batch * kv_bytes) / self.tokens_per_step

    def step_bytes(self, system: System, reads: Reads | None) -> int:
        return round(self.bytes_per_token(system, reads) * self.tokens_per_step)

    def tokens_per_second(self, run: Run) -> float:
        if self.plan.phase == "decode":
            return run.decode_tokens_per_second
        return self.batch * self.context / run.ttft


@dataclass(frozen=True, slots=True)
class Series:
    """What the rounds gave for one system at one point."""

    system: System
    speeds: list[float]  # tokens a second
    ceilings: list[float]  # GB/s
    reads: list[Reads | None]

    def row(self, model: str, point: Point, dense: Series | None) -> Row:
        """`dense`: what a policy is compared with; None of everything else."""
        sizes = [point.bytes_per_token(self.system, reads) for reads in self.reads]
        bounds = [c * 1e9 / size for c, size in zip(self.ceilings, sizes, strict=True)]
        shares = [speed / bound for speed, bound in zip(self.speeds, bounds, strict=True)]
        counted = [reads for reads in self.reads if reads is not None]
        return Row(
            system=self.system.name,
            model=model,
            format=self.system.format,
            policy=self.system.policy,
            batch=point.batch,
            context=point.context,
            new_tokens=point.plan.new_tokens,
            tokens_per_second=round(statistics.median(self.speeds), 2),
            tokens_per_second_low=round(min(self.speeds), 2),
            tokens_per_second_high=round(max(self.speeds), 2),
            read_ceiling_gb_s=round(statistics.median(self.ceilings), 1),
            byte_bound_tokens_per_second=round(statistics.median(bounds), 2),
            percent_of_byte_bound=round(100 * statistics.median(shares), 1),
            bytes_per_token=round(statistics.median(sizes)),
            density=_mean(reads.density for reads in counted) if counted else None,
            union=_mean(reads.union for reads in counted) if counted else None,
            share_of_allowed_time=None if dense is None else self._share(point, sizes, dense),
            against_dense=None if dense is None else median_ratio(self.speeds, dense.speeds),
        )

    def _share(self, point: Point, sizes: Sequence[float], dense: Series) -> float | None:
        """None where nothing less is read."""
        shares = []
        for speed, size, dense_speed, reads in zip(
            self.speeds, sizes, dense.speeds, dense.reads, strict=True
        ):
            less = size / point.bytes_per_token(dense.system, reads)
            shares.append(share_of_allowed_time(1 / dense_speed, 1 / speed, less))
        return (
            round(statistics.median(found), 3)
            if (found := [s for s in shares if s is not None])
            else None
        )


def share_of_allowed_time(dense: float, sparse: float, bytes_read: float) -> float | None:
    """(t_dense - t_sparse) / (t_dense (1 - bytes_sparse / bytes_dense)), of two times and of `bytes_read` as a
    share of the dense ones; None where reading allows nothing to be saved.

    1: the time falls as the bytes do; 0: nothing is saved; below 0: slower than dense.
    """
    return (dense - sparse) / (dense * (1 - bytes_read)) if bytes_read < 1 else None


def _dense_of(series: Series, ours: Sequence[Series]) -> Series | None:
    """The same format dense, of a policy that is not."""
    if series.system.policy == DENSE_POLICY:
        return None
    own = (each for each in ours if each.system.format == series.system.format)
    return next((each for each in own if each.system.policy == DENSE_POLICY), None)


def _mean(values: Iterable[float]) -> float:
    return round(statistics.fmean(values), 4)


def measure_point(
    systems: Sequence[System],
    point: Point,
    threads: int,
    prompts: Callable[[], Prompts],
    on_run: Callable[[], None],
) -> list[Series]:
    new_tokens, rounds = point.plan.new_tokens, point.plan.rounds
    # At the size that is measured: some systems compile for each shape that they meet.
    runs = take_turns(systems, 0, prompts(), min(new_tokens, WARM_UP_TOKENS), on_run)
    found = [Series(system, [], [], []) for system in systems]
    for turn in range(rounds):
        wait_until_idle()
        sizes = [point.step_bytes(s, run.reads) for s, run in zip(systems, runs, strict=True)]
        ceilings = _read_ceilings(sizes, threads)
        runs = take_turns(systems, turn, prompts(), new_tokens, on_run)
        for series, run, ceiling in zip(found, runs, ceilings, strict=True):
            series.speeds.append(point.tokens_per_second(run))
            series.ceilings.append(ceiling)
            series.reads.append(run.reads)
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


def _comparable(ours: Series, peer: Series, all_ours: Sequence[Series]) -> bool:
    """At the same data type, or where we were not measured in the peer's, at the same bits."""
    theirs = peer.system.format
    if theirs in [data_type(series.system.format) for series in all_ours]:
        return theirs == data_type(ours.system.format)
    return bits(theirs) == bits(ours.system.format)


def _ratio(ours: Series, peer: Series, point: Point) -> Ratio:
    ratios = [a / b for a, b in zip(ours.speeds, peer.speeds, strict=True)]
    return Ratio(
        format=ours.system.format,
        policy=ours.system.policy,
        peer=peer.system.name,
        peer_format=peer.system.format,
        batch=point.batch,
        context=point.context,
        ratio=round(statistics.median(ratios), 3),
        ratio_low=round(min(ratios), 3),
        ratio_high=round(max(ratios), 3),
    )
