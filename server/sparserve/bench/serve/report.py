"""The report of load on servers: figures, and what they are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from sparserve import __version__
from sparserve.bench.machine import describe_machine
from sparserve.bench.serve.load import Load
from sparserve.bench.serve.records import Run
from sparserve.bench.serve.summary import Summary, median_ratio_of, summarize
from sparserve.errors import SparserveError

LAG_SHARE = 0.1  # of the median ITL, above which our own lateness spoils it


@dataclass(frozen=True, slots=True)
class Plan:
    loads: Sequence[Load]
    rounds: int
    warmup: int
    seed: int
    timeout: float
    percentiles: Sequence[float]
    slos: dict[str, float]  # milliseconds
    dataset: str  # in words


@dataclass(frozen=True, slots=True)
class Row:
    """One target under one load."""

    target: str
    load: Load
    label: str  # of the load
    summary: Summary  # of all rounds
    rounds: Sequence[Summary]
    runs: Sequence[Run]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Output tokens/s of the first target over another's, medians of the rounds' ratios."""

    label: str
    other: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Report:
    version: str
    time: str
    machine: str  # that the generator ran on
    read_ceilings_gb_s: Sequence[
        float
    ]  # of that machine, before each round; none: it was not measured
    plan: Plan
    targets: Sequence[dict[str, str]]  # name, address, model, counted_by
    rows: Sequence[Row]
    ratios: Sequence[Ratio]

    def as_json(self) -> dict[str, Any]:
        """With what came when of every request, from which every figure can be made again."""
        found: dict[str, Any] = _plain(asdict(self))
        for row in found["rows"]:
            for run in row["runs"]:
                for record in run["records"]:
                    del record["origin"]
        return found


def spoilt_by_lag(summary: Summary) -> str:
    """What to say where the generator was too late for its own figures; "" where it was not."""
    if summary.loop_lag is None or summary.itl is None:
        return ""
    lag, itl = summary.loop_lag.percentiles["99"], summary.itl.median
    if lag <= max(1.0, LAG_SHARE * itl):
        return ""
    return (
        f"the generator itself was up to {lag:.1f} ms late (p99), {lag / max(itl, 0.001):.0%} of the median ITL: "
        "high percentiles are that uncertain; give it a CPU of its own, or another machine"
    )


def make_report(
    targets: Sequence[dict[str, str]],
    plan: Plan,
    runs: dict[tuple[int, int], list[Run]],
    ceilings: Sequence[float],
) -> Report:
    def figures(found: Sequence[Run]) -> Summary:
        return summarize(found, plan.percentiles, plan.slos)

    rows = []
    for (place, index), found in runs.items():
        load, name = plan.loads[index], targets[place]["name"]
        each = [figures([run]) for run in found]
        rows.append(Row(name, load, load.label, figures(found), each, found))
    if not any(row.summary.completed for row in rows):
        raise SparserveError(f"every request failed; the first: {_first_failure(rows)}")
    return Report(
        version=__version__,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        read_ceilings_gb_s=[round(ceiling, 1) for ceiling in ceilings],
        plan=plan,
        targets=targets,
        rows=rows,
        ratios=_ratios(rows, len(targets)),
    )


def _ratios(rows: Sequence[Row], targets: int) -> list[Ratio]:
    """`rows` has the targets of each load one after another."""
    found = []
    for start in range(0, len(rows), targets):
        first, *others = rows[start : start + targets]
        for other in others:
            if numbers := median_ratio_of(first.rounds, other.rounds):
                middle, low, high = (round(number, 3) for number in numbers)
                found.append(Ratio(first.label, other.target, middle, low, high))
    return found


def _first_failure(rows: Sequence[Row]) -> str:
    failed = [r for row in rows for run in row.runs for r in run.records if r.error]
    return f"{failed[0].error}: {failed[0].message}" if failed else "nothing was sent"


def _plain(value: Any) -> Any:
    """Numbers that JSON has no word for as text."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else str(value)
    return value
