"""The picture of what speed costs: tokens/s against KL, every format and policy and every rival."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparserve.bench.peers.packages import require
from sparserve.bench.plot import colour_of
from sparserve.bench.systems import DENSE_POLICY, data_type
from sparserve.errors import ConfigError

LEAST_KL = 1e-6  # what lies below is drawn here: 0 has no place on a logarithmic axis
# By the kind of policy, which its words begin with.
MARKERS = {DENSE_POLICY: "o", "core": "s", "token": "D", "core+token": "P", "exact": "X"}


@dataclass(frozen=True, slots=True)
class Point:
    system: str
    format: str
    policy: str
    kl: float
    kl_low: float
    kl_high: float
    speed: float  # tokens/s of all sequences together
    speed_low: float
    speed_high: float

    @property
    def name(self) -> str:
        """The legend has the whole format."""
        own = f"{self.system} {data_type(self.format)}"
        return own if self.policy == DENSE_POLICY else self.policy


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
    """A matplotlib figure. Policies of one kind in one format are joined by a line, from dense on."""
    figure_class = require("matplotlib.figure").Figure
    figure = figure_class(figsize=(10, 6.5), layout="constrained", dpi=160)
    panel = figure.subplots()
    formats: dict[str, list[str]] = {}
    for point in points.points:
        of_system = formats.setdefault(point.system, [])
        if point.format not in of_system:
            of_system.append(point.format)
    for system, names in formats.items():
        for place, format in enumerate(names):
            own = [p for p in points.points if (p.system, p.format) == (system, format)]
            _draw_format(panel, own, colour_of(system, place))
    panel.set_xscale("log")
    panel.set_ylim(0, 1.1 * max(point.speed_high for point in points.points))
    panel.set_xlabel("KL to the original in float32, nats per token (less is better)")
    panel.set_ylabel("tokens/s (more is better)")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, fontsize=9)
    what = "one request" if points.batch == 1 else f"{points.batch} requests at once"
    figure.suptitle(
        f"{points.model}: decode speed against quality, {what} after {points.context} tokens\n"
        "whiskers: slowest and fastest round, 95 % interval of the KL",
        fontsize=11,
    )
    return figure


def _draw_format(panel: Any, points: Sequence[Point], colour: tuple[float, ...]) -> None:
    ordered = sorted(points, key=lambda point: (point.policy != DENSE_POLICY, point.kl))
    at = [max(point.kl, LEAST_KL) for point in ordered]
    speeds = [point.speed for point in ordered]
    for kind in {_kind(point.policy) for point in ordered} - {DENSE_POLICY}:
        own = [i for i, p in enumerate(ordered) if _kind(p.policy) in (kind, DENSE_POLICY)]
        line = [at[i] for i in own], [speeds[i] for i in own]
        panel.plot(*line, color=colour, linewidth=0.9, alpha=0.5, zorder=1)
    panel.errorbar(
        at, speeds,
        xerr=_whiskers([(p.kl_low, p.kl, p.kl_high) for p in ordered]),
        yerr=_whiskers([(p.speed_low, p.speed, p.speed_high) for p in ordered]),
        fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.7, zorder=2,
    )  # fmt: skip
    for index, (point, x) in enumerate(zip(ordered, at, strict=True)):
        panel.plot(
            x, point.speed, MARKERS.get(_kind(point.policy), "^"), color=colour, markeredgecolor="black",
            markeredgewidth=0.6, markersize=8 if point.policy == DENSE_POLICY else 6.5, zorder=3,
            label=f"{point.system} {point.format}" if index == 0 else None, linestyle="none",
        )  # fmt: skip
        panel.annotate(
            point.name, (x, point.speed), xytext=(6, 4), textcoords="offset points", fontsize=7
        )


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
    return Point(
        *key,
        kl=scored["kl"],
        kl_low=scored["kl_low"],
        kl_high=scored["kl_high"],
        speed=timed["tokens_per_second"],
        speed_low=timed["tokens_per_second_low"],
        speed_high=timed["tokens_per_second_high"],
    )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
