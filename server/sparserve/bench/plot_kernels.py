"""A picture of the phases of a step: for each step a panel, in it a stacked bar for each level."""

from __future__ import annotations

from typing import Any

from sparse_kernels.decoder import PHASES
from sparserve.bench.kernels import WHOLE, Point, Report
from sparserve.bench.peers.packages import require

# Okabe and Ito's colours, which colour-blind eyes tell apart.
COLOURS = {
    "qkv": "#0072B2",
    "attention": "#D55E00",
    "output": "#56B4E9",
    "mlp": "#E69F00",
    "head": "#009E73",
    "candidates": "#CC79A7",
}
PANEL_SIZE = (3.4, 4.2)  # inches


def draw(report: Report) -> Any:
    """A matplotlib figure; each panel has a scale of its own."""
    figure_class = require("matplotlib.figure").Figure  # not pyplot: nothing here has a window
    points = report.plan.points
    size = (max(7.0, PANEL_SIZE[0] * len(points)), PANEL_SIZE[1] + 1)
    figure = figure_class(figsize=size, layout="constrained", dpi=160)
    panels = figure.subplots(1, len(points), squeeze=False)[0]
    for panel, point in zip(panels, points, strict=True):
        _draw_panel(panel, report, point)
    panels[0].set_ylabel("milliseconds")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(PHASES), frameon=False, fontsize=9
    )
    figure.suptitle(
        f"{report.model}, {report.format}: phases of a step on {report.threads} threads of {report.machine}\n"
        f"medians of {report.plan.rounds} alternated rounds; "
        f"memory reads at {report.read_ceiling_gb_s:.0f} GB/s",
        fontsize=10,
    )
    return figure


def _draw_panel(panel: Any, report: Report, point: Point) -> None:
    levels, decode = report.plan.levels, point.kind == "decode"
    rows = {
        (row.level, row.phase): row
        for row in report.rows
        if (row.step, row.batch) == (point.kind, point.batch)
    }
    below = [0.0] * len(levels)
    for phase in PHASES:
        heights = [rows[level, phase].milliseconds for level in levels]
        panel.bar(levels, heights, 0.7, below, color=COLOURS[phase], label=phase)
        below = [base + height for base, height in zip(below, heights, strict=True)]
    for place, level in enumerate(levels):
        whole = rows[level, WHOLE]
        second = f"{whole.percent_of_ceiling:.0f} %" if decode else f"{whole.gflops:,.0f} GFLOP/s"
        text = f"{whole.milliseconds:,.1f} ms\n{second}"
        panel.annotate(
            text,
            (place, below[place]),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7,
        )
    panel.set_ylim(0, 1.15 * max(below))  # room for the labels
    name = f"decode, batch {point.batch}, after" if decode else "prompt of"
    panel.set_title(f"{name} {point.context:,} tokens", fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
