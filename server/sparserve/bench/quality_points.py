"""What a picture of speed and quality is made of: points, from reports of `sparserve eval` and `sparserve bench
decode`, and the front of those that nothing else is better than."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparserve.bench.systems import DENSE_POLICY, data_type
from sparserve.errors import ConfigError

OURS = "sparserve"

_Key = tuple[str, str, str]  # system, format, policy


@dataclass(frozen=True, slots=True)
class Point:
    system: str
    weights: str  # their format, or the recipe that made them
    policy: str
    label: str  # of no other point
    kl: float
    kl_low: float
    kl_high: float
    speed: float  # tokens/s of all sequences together
    speed_low: float
    speed_high: float
    bits: float | None = None  # of a decoder weight of the original, with its share of scales
    pruned: float = 0  # share of the original's parameters that are not there
    healed: str | None = None  # what it was healed through


@dataclass(frozen=True, slots=True)
class Points:
    points: Sequence[Point]
    unmatched: Sequence[str]  # what has only one of speed and KL
    model: str
    batch: int
    context: int


def join(files: Iterable[Path], batch: int, context: int | None) -> Points:
    """Reports of `sparserve eval` and `sparserve bench decode` on one model, joined by system, format and
    policy; the fastest and slowest rounds of those at `batch` and `context` (None: the shortest that there
    is). Raises ConfigError.
    """
    scored: dict[_Key, dict[str, Any]] = {}
    timed: list[dict[str, Any]] = []
    for file in files:
        for row in _rows(file):
            if "kl" in row:
                scored[_key(row)] = row
            elif row["batch"] == batch:
                timed.append(row)
    if not scored or not timed:
        missing = "sparserve eval" if not scored else f"sparserve bench decode at batch {batch}"
        raise ConfigError(
            f"no report of {missing} is among the files; give one of each, made with --json"
        )
    if len(models := {row["model"] for row in timed}) > 1:
        raise ConfigError(
            f"the reports are of several models, {', '.join(sorted(models))}; draw each"
        )
    contexts = {row["context"] for row in timed}
    if context is not None and context not in contexts:
        raise ConfigError(f"no report has a context of {context}; there are: {_listed(contexts)}")
    context = min(contexts) if context is None else context
    speeds = {_key(row): row for row in timed if row["context"] == context}
    for system, format, policy in list(speeds):
        dense = scored.get((system, format, DENSE_POLICY))
        if kind_of(policy) == "exact" and dense is not None:  # it has the distributions of dense
            scored[system, format, policy] = dense
    both = [key for key in scored if key in speeds]
    if not both:
        raise ConfigError("no system, format and policy is in reports of both commands")
    names = _names(both)
    return Points(
        [_point(key, names[key[:2]], scored[key], speeds[key]) for key in both],
        [" ".join(key) for key in scored.keys() ^ speeds.keys()],
        models.pop(),
        batch,
        context,
    )


def front(
    points: Iterable[Point],
    at: Callable[[Point], float],
    best: Callable[[Iterable[float]], float] = max,
) -> list[Point]:
    """By KL, those that no point with at most their KL beats or equals in `at`."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.kl, at(p) if best is min else -at(p))):
        reached = [at(p) for p in found]
        if not found or best([*reached, at(point)]) not in reached:
            found.append(point)
    return found


def kind_of(policy: str) -> str:
    """Of its words; see `PolicySpec`."""
    return re.sub(r":[^+/]*", "", policy.split("/")[0])


def _rows(file: Path) -> list[dict[str, Any]]:
    """Raises ConfigError of what is no report of either command."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        rows: list[dict[str, Any]] = report["rows"] if isinstance(report, dict) else report
        for row in rows:
            missing = {"system", "format"} - row.keys()
            needed = _SCORED if "kl" in row else _TIMED
            if missing := missing | (needed - row.keys()):
                raise ConfigError(
                    f"{file} is no report of sparserve eval or bench decode: its rows lack "
                    f"{', '.join(sorted(missing))}"
                )
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{file} is no report of sparserve eval or bench decode: {error}"
        ) from error
    return rows


_SCORED = {"kl", "kl_low", "kl_high"}
_TIMED = {
    "model", "batch", "context", "tokens_per_second", "tokens_per_second_low", "tokens_per_second_high",
}  # fmt: skip


def _key(row: dict[str, Any]) -> _Key:
    return row["system"], row["format"], row.get("policy", DENSE_POLICY)


def _names(keys: Iterable[_Key]) -> dict[tuple[str, str], str]:
    """Of (system, format): the data type alone where that tells it from the others. Ours need no system."""
    own = dict.fromkeys(key[:2] for key in keys)
    times = Counter((system, data_type(format)) for system, format in own)
    names = {}
    for system, format in own:
        weights = data_type(format) if times[system, data_type(format)] == 1 else format
        names[system, format] = weights if system == OURS else f"{system} {weights}"
    return names


def _point(key: _Key, weights: str, scored: dict[str, Any], timed: dict[str, Any]) -> Point:
    policy = key[2]
    return Point(
        *key,
        label=weights if policy == DENSE_POLICY else f"{weights} {policy}",
        kl=scored["kl"],
        kl_low=scored["kl_low"],
        kl_high=scored["kl_high"],
        speed=timed["tokens_per_second"],
        speed_low=timed["tokens_per_second_low"],
        speed_high=timed["tokens_per_second_high"],
    )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
