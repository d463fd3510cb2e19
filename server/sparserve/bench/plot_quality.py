"""The picture of what speed costs: tokens/s against KL, every format and policy and every rival."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sparserve.bench.peers.packages import require
from sparserve.bench.plot import colour_of
from sparserve.bench.quality_points import OURS, Point, Points, front, kind_of
from sparserve.bench.systems import DENSE_POLICY

LEAST_KL = 1e-6  # what lies below is drawn here: 0 has no place on a logarithmic axis
# By the kind of policy, which its words begin with.
MARKERS = {
    DENSE_POLICY: "o", "core": "s", "token": "D", "core+token": "P", "exact": "X", "auto": "^", "kl": "v",
}  # fmt: skip
OTHER_MARKER = "*"
LABEL_SIZE, LABEL_GAP, LABEL_STEP = 7, 8, 9  # points: of its letters, to its mark, to the next one
LEGEND_COLUMN = 1.4  # inches
LINE_COLOUR = "#777777"


def draw_quality(points: Points) -> Any:
    """A matplotlib figure: speed over KL and, where all points have them, bits over KL. Policies of one kind on the
    same weights are joined by a faint line, from dense on. Steps join ours, and rivals, that no other of them is better
    than in both; only these have labels, for there may be many.
    """
    figure_class = require("matplotlib.figure").Figure
    with_bits = all(point.bits is not None for point in points.points)
    size = (16 if with_bits else 10, 7)
    figure = figure_class(figsize=size, layout="constrained", dpi=160)
    drawn = [(_SPEED, points.points)]
    if with_bits:
        drawn.append((_BITS, _of_each_size(points.points)))
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for panel, (axis, own) in zip(panels, drawn, strict=True):
        _draw_panel(panel, own, axis)
    figure.legend(
        handles=_legend(points.points), loc="outside lower center", ncols=int(size[0] / LEGEND_COLUMN), frameon=False, fontsize=9
    )  # fmt: skip
    what = "one request" if points.batch == 1 else f"{points.batch} requests at once"
    figure.suptitle(
        f"{points.model}: quality against {'speed and size' if with_bits else 'decode speed'}, {what} after "
        f"{points.context} tokens\n"
        "steps: the best within each KL; whiskers: slowest and fastest round, 95 % interval of the KL",
        fontsize=11,
    )
    figure.draw_without_rendering()  # labels are put where there is room, in a layout that is settled
    for panel, (axis, own) in zip(panels, drawn, strict=True):
        for best, ours in _fronts(own, axis):
            _label(panel, best, axis, ours)
    return figure


@dataclass(frozen=True, slots=True)
class _Axis:
    """What is drawn over the KL."""

    title: str
    best: Callable[[Iterable[float]], float]
    range: Callable[[Point], tuple[float, float, float]]  # low, middle, high

    def at(self, point: Point) -> float:
        return self.range(point)[1]

    def place(self, point: Point) -> tuple[float, float]:
        return max(point.kl, LEAST_KL), self.at(point)


_SPEED = _Axis("tokens/s (more is better)", max, lambda p: (p.speed_low, p.speed, p.speed_high))
_BITS = _Axis(
    "bits per decoder weight of the original (less is better)", min, lambda p: (p.bits or 0,) * 3
)


def _draw_panel(panel: Any, points: Sequence[Point], axis: _Axis) -> None:
    for system, weights in dict.fromkeys((point.system, point.weights) for point in points):
        own = [p for p in points if (p.system, p.weights) == (system, weights)]
        _draw_weights(panel, own, axis)
    for best, ours in _fronts(points, axis):
        places = zip(*map(axis.place, best), strict=True)
        panel.plot(
            *places, "--" if ours else ":", drawstyle="steps-post", color=LINE_COLOUR, linewidth=1, zorder=0
        )  # fmt: skip
    panel.set_xscale("log")
    panel.margins(x=0.1)
    panel.set_ylim(0, 1.15 * max(axis.range(point)[2] for point in points))
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


def _fronts(points: Sequence[Point], axis: _Axis) -> list[tuple[list[Point], bool]]:
    """(front, whether it is ours), of ours and of all rivals together, where there are any."""
    kinds = (([p for p in points if (p.system == OURS) == ours], ours) for ours in (True, False))
    return [(front(own, axis.at, axis.best), ours) for own, ours in kinds if own]


def _draw_weights(panel: Any, points: Sequence[Point], axis: _Axis) -> None:
    """All policies on the same weights."""
    colour = colour_of(points[0].system, 0)
    ordered = sorted(points, key=lambda point: (point.policy != DENSE_POLICY, point.kl))
    at, heights = zip(*map(axis.place, ordered), strict=True)
    for kind in {kind_of(point.policy) for point in ordered} - {DENSE_POLICY}:
        own = [p for p in ordered if kind_of(p.policy) in (kind, DENSE_POLICY)]
        line = zip(*map(axis.place, own), strict=True)
        panel.plot(*line, "-", color=colour, linewidth=0.8, alpha=0.3, zorder=1)
    panel.errorbar(
        at, heights,
        xerr=_whiskers([(p.kl_low, p.kl, p.kl_high) for p in ordered]),
        yerr=_whiskers([axis.range(p) for p in ordered]),
        fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.5, zorder=2,
    )  # fmt: skip
    for point in ordered:
        look = _mark(kind_of(point.policy), pruned=point.pruned > 0)
        panel.plot(*axis.place(point), color=colour, zorder=3, **look)
        if point.healed is not None:
            panel.plot(*axis.place(point), zorder=3, **_RING)


def _whiskers(ranges: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """(low, middle, high) of each -> what matplotlib draws down and up from the middle."""
    down = [max(0.0, middle - low) for low, middle, _ in ranges]
    return [down, [max(0.0, high - middle) for _, middle, high in ranges]]


def _mark(kind: str, *, pruned: bool) -> dict[str, Any]:
    """Half of the mark of a pruned model is missing."""
    return {
        "marker": MARKERS.get(kind, OTHER_MARKER), "markersize": 8 if kind == DENSE_POLICY else 7,
        "markeredgecolor": "black", "markeredgewidth": 0.6, "linestyle": "none",
        "fillstyle": "left" if pruned else "full", "markerfacecoloralt": "white",
    }  # fmt: skip


_RING = {
    "marker": "o", "markersize": 14, "markeredgecolor": "black", "markeredgewidth": 0.9, "linestyle": "none",
    "fillstyle": "none",
}  # fmt: skip


def _legend(points: Sequence[Point]) -> list[Any]:
    """Colours are systems; marks, alike in all colours, are policies and what else was done."""
    line = require("matplotlib.lines").Line2D
    kinds = {kind_of(point.policy) for point in points}
    found = [
        line([], [], color=colour_of(system, 0), label=system, **_mark(DENSE_POLICY, pruned=False))
        for system in dict.fromkeys(point.system for point in points)
    ]
    grey = LINE_COLOUR
    found += [
        line([], [], color=grey, label=kind, **_mark(kind, pruned=False))
        for kind in [*(kind for kind in MARKERS if kind in kinds), *sorted(kinds - MARKERS.keys())]
    ]
    if any(point.pruned for point in points):
        found.append(line([], [], color=grey, label="pruned", **_mark(DENSE_POLICY, pruned=True)))
    if any(point.healed is not None for point in points):
        found.append(line([], [], label="healed", **_RING))
    return found


def _label(panel: Any, best: Sequence[Point], axis: _Axis, ours: bool) -> None:
    """Beside a front of ours on the side where nothing is better, so nothing is there; of rivals on the other one. Each
    label is beyond the one before it.
    """
    up = 1 if ours == (axis.best is max) else -1
    side = -1 if ours else 1
    points_of = 72 / panel.figure.dpi  # a pixel
    reached = float("-inf")
    for point in best if ours else reversed(best):
        y = points_of * panel.transData.transform(axis.place(point))[1]
        reached = max(up * y + LABEL_GAP, reached + LABEL_STEP)
        text = panel.annotate(
            point.label, axis.place(point), xytext=(side * LABEL_GAP, up * reached - y), textcoords="offset points",
            fontsize=LABEL_SIZE, ha="right" if ours else "left", va="center",
            color="black" if ours else colour_of(point.system, 0),
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.6},
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": LINE_COLOUR, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
        text.set_in_layout(False)
        extent = text.get_window_extent()
        over = max(0.0, panel.bbox.x0 - extent.x0) - max(0.0, extent.x1 - panel.bbox.x1)
        text.set_position((side * LABEL_GAP + points_of * over, up * reached - y))
