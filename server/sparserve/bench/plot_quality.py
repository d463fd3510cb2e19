"""The picture of what speed costs: tokens/s against KL, every format and policy and every rival."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparserve.bench.peers.packages import require
from sparserve.bench.plot import colour_of
from sparserve.bench.systems import DENSE_POLICY, data_type
from sparserve.errors import ConfigError

LIGHTEST = 2.5  # steps of `colour_of`, of the last of a system's weights
LEAST_KL = 1e-6  # what lies below is drawn here: 0 has no place on a logarithmic axis
# By the kind of policy, which its words begin with.
MARKERS = {DENSE_POLICY: "o", "core": "s", "token": "D", "core+token": "P", "exact": "X"}


@dataclass(frozen=True, slots=True)
class Point:
    system: str
    weights: str  # their format, or the recipe that made them
    policy: str
    label: str  # beside it; the legend has system and weights
    kl: float
    kl_low: float
    kl_high: float
    speed: float  # tokens/s of all sequences together
    speed_low: float
    speed_high: float
    bits: float | None = None  # of a decoder weight, with its share of scales


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
    scored: dict[tuple[str, str, str], dict[str, Any]] = {}
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
        if _kind(policy) == "exact" and dense is not None:  # it has the distributions of dense
            scored[system, format, policy] = dense
    both = [key for key in scored if key in speeds]
    if not both:
        raise ConfigError("no system, format and policy is in reports of both commands")
    return Points(
        [_point(key, scored[key], speeds[key]) for key in both],
        [" ".join(key) for key in scored.keys() ^ speeds.keys()],
        models.pop(),
        batch,
        context,
    )


def draw_quality(points: Points) -> Any:
    """A matplotlib figure: speed over KL and, where all points have them, bits over KL. Policies of one kind on the
    same weights are joined by a line, from dense on; a dashed one joins what nothing else is better than.
    """
    figure_class = require("matplotlib.figure").Figure
    with_bits = all(point.bits is not None for point in points.points)
    size = (16 if with_bits else 10, 6.5)
    figure = figure_class(figsize=size, layout="constrained", dpi=160)
    panels = figure.subplots(1, 2 if with_bits else 1, squeeze=False)[0]
    _draw_panel(panels[0], points.points, _SPEED)
    if with_bits:
        _draw_panel(panels[1], _of_each_size(points.points), _BITS)
    panels[0].legend(frameon=False, fontsize=9)
    what = "one request" if points.batch == 1 else f"{points.batch} requests at once"
    figure.suptitle(
        f"{points.model}: quality against {'speed and size' if with_bits else 'decode speed'}, {what} after "
        f"{points.context} tokens\n"
        "whiskers: slowest and fastest round, 95 % interval of the KL; dashed: nothing else is better in both",
        fontsize=11,
    )
    return figure


@dataclass(frozen=True, slots=True)
class _Axis:
    """What is drawn over the KL."""

    title: str
    best: Callable[[Iterable[float]], float]
    range: Callable[[Point], tuple[float, float, float]]  # low, middle, high

    def at(self, point: Point) -> float:
        return self.range(point)[1]


_SPEED = _Axis("tokens/s (more is better)", max, lambda p: (p.speed_low, p.speed, p.speed_high))
_BITS = _Axis("bits per decoder weight (less is better)", min, lambda p: (p.bits or 0,) * 3)


def _draw_panel(panel: Any, points: Sequence[Point], axis: _Axis) -> None:
    weights: dict[str, list[str]] = {}
    for point in points:
        of_system = weights.setdefault(point.system, [])
        if point.weights not in of_system:
            of_system.append(point.weights)
    for system, names in weights.items():
        # The last of many is still no white.
        step = min(1.0, LIGHTEST / max(1, len(names) - 1))
        for place, name in enumerate(names):
            own = [p for p in points if (p.system, p.weights) == (system, name)]
            _draw_weights(panel, own, axis, colour_of(system, place * step))
    best = front(points, axis.at, axis.best)
    line = [max(point.kl, LEAST_KL) for point in best], [axis.at(point) for point in best]
    panel.plot(*line, "--", color="#777777", linewidth=1, zorder=0)
    for index, point in enumerate(sorted(points, key=lambda p: p.kl)):
        where = max(point.kl, LEAST_KL), axis.at(point)
        offset = (6, 4 if index % 2 == 0 else -10)  # neighbours stay apart
        panel.annotate(point.label, where, xytext=offset, textcoords="offset points", fontsize=7)
    panel.set_xscale("log")
    panel.set_ylim(0, 1.1 * max(axis.range(point)[2] for point in points))
    panel.set_xlabel("KL to the original in float32, nats per token (less is better)")
    panel.set_ylabel(axis.title)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)


def _of_each_size(points: Sequence[Point]) -> list[Point]:
    """Policies read less of the same weights: only the best of each weights, which is dense where it is there."""
    best: dict[tuple[str, str], Point] = {}
    for point in sorted(points, key=lambda p: p.kl):
        best.setdefault((point.system, point.weights), point)
    return list(best.values())


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


def _draw_weights(
    panel: Any, points: Sequence[Point], axis: _Axis, colour: tuple[float, ...]
) -> None:
    ordered = sorted(points, key=lambda point: (point.policy != DENSE_POLICY, point.kl))
    at = [max(point.kl, LEAST_KL) for point in ordered]
    heights = [axis.at(point) for point in ordered]
    for kind in {_kind(point.policy) for point in ordered} - {DENSE_POLICY}:
        own = [i for i, p in enumerate(ordered) if _kind(p.policy) in (kind, DENSE_POLICY)]
        line = [at[i] for i in own], [heights[i] for i in own]
        panel.plot(*line, color=colour, linewidth=0.9, alpha=0.5, zorder=1)
    panel.errorbar(
        at, heights,
        xerr=_whiskers([(p.kl_low, p.kl, p.kl_high) for p in ordered]),
        yerr=_whiskers([axis.range(p) for p in ordered]),
        fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.7, zorder=2,
    )  # fmt: skip
    for index, (point, x) in enumerate(zip(ordered, at, strict=True)):
        panel.plot(
            x, axis.at(point), MARKERS.get(_kind(point.policy), "^"), color=colour, markeredgecolor="black",
            markeredgewidth=0.6, markersize=8 if point.policy == DENSE_POLICY else 6.5, zorder=3,
            label=f"{point.system} {point.weights}" if index == 0 else None, linestyle="none",
        )  # fmt: skip


def _whiskers(ranges: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """(low, middle, high) of each -> what matplotlib draws down and up from the middle."""
    down = [max(0.0, middle - low) for low, middle, _ in ranges]
    return [down, [max(0.0, high - middle) for _, middle, high in ranges]]


def _kind(policy: str) -> str:
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


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["system"], row["format"], row.get("policy", DENSE_POLICY)


def _point(key: tuple[str, str, str], scored: dict[str, Any], timed: dict[str, Any]) -> Point:
    system, format, policy = key
    return Point(
        *key,
        label=f"{system} {data_type(format)}" if policy == DENSE_POLICY else policy,
        kl=scored["kl"],
        kl_low=scored["kl_low"],
        kl_high=scored["kl_high"],
        speed=timed["tokens_per_second"],
        speed_low=timed["tokens_per_second_low"],
        speed_high=timed["tokens_per_second_high"],
    )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
