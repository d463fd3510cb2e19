"""The picture of what pruning costs: the KL of each criterion, a panel for each share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparserve.bench.peers.packages import require
from sparserve.bench.pruning import Report, Row

# Okabe and Ito's colours, which colour-blind eyes tell apart.
COLOURS = {"uniform": "#0072B2", "adaptive": "#D55E00"}
MARKERS = {"none": "o", "bias": "s", "least_squares": "D"}
OF = {
    "neurons_first": "all parameters, neurons first",
    "together": "all parameters",
    "heads": "attention",
    "mlp": "feed-forward layers",
}
APART = 0.11  # of two marks of a criterion; criteria are 1 apart


def draw_pruning(report: Report) -> Any:
    """A matplotlib figure: KL of each criterion, colours for allocations, marks for restorations, whiskers of the 95 %
    interval."""
    figure_class = require("matplotlib.figure").Figure
    rows = report.rows
    panels = list(dict.fromkeys((row.what, row.share) for row in rows))
    figure = figure_class(figsize=(2 + 4.5 * len(panels), 5), layout="constrained", dpi=160)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, [row for row in rows if (row.what, row.share) == panel])
        axis.set_title(f"{panel[1]:.0%} of {OF[panel[0]]}", fontsize=10)
    axes[0].set_ylabel("KL to the original, nats per token")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.suptitle(f"{report.model}: what pruning costs", fontsize=11)
    return figure


def _draw_panel(axis: Any, rows: Sequence[Row]) -> None:
    criteria = list(dict.fromkeys(row.how.criterion for row in rows))
    kinds = [(allocation, restore) for allocation in COLOURS for restore in MARKERS]
    for place, (allocation, restore) in enumerate(kinds):
        own = [
            row for row in rows if (row.how.allocation, row.how.restore) == (allocation, restore)
        ]
        if not own:
            continue
        at = [criteria.index(r.how.criterion) + APART * (place - (len(kinds) - 1) / 2) for r in own]
        found = [row.quality for row in own]
        whiskers = [[q.kl - q.kl_low for q in found], [q.kl_high - q.kl for q in found]]
        axis.errorbar(
            at, [q.kl for q in found], whiskers, color=COLOURS[allocation], marker=MARKERS[restore], linestyle="none",
            markersize=5, elinewidth=0.8, label=f"{allocation}, {restore.replace('_', ' ')}",
        )  # fmt: skip
    axis.set_yscale("log")
    axis.set_xticks(range(len(criteria)), criteria, rotation=20)
    axis.grid(axis="y", which="both", linewidth=0.3)
