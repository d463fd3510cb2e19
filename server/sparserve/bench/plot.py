"""A picture of a sweep: tokens/s of every system, and the byte bound above each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparserve.bench.peers.packages import require
from sparserve.bench.sweep import Report, Row
from sparserve.bench.systems import DENSE_POLICY

# Okabe and Ito's colours, which colour-blind eyes tell apart.
COLOURS = {
    "sparserve": "#D55E00",
    "llama.cpp": "#0072B2",
    "transformers": "#E69F00",
    "openvino": "#009E73",
}
GROUP_WIDTH = 0.84  # of the distance between two groups of bars
LEGEND_COLUMN = 2.0  # inches
LABEL_SHARE = 0.17  # of a panel's height: a label of two lines


def require_matplotlib() -> None:
    """Raises ConfigError where it is missing: before the minutes that a measurement takes."""
    require("matplotlib")


def draw(report: Report) -> Any:
    """A matplotlib figure: a panel for each batch size, in it a group of bars for each context."""
    figure_class = require("matplotlib.figure").Figure  # not pyplot: nothing here has a window
    batches = report.plan.batches
    series = list(dict.fromkeys(_series(row) for row in report.rows))
    bars = len(series) * len(report.plan.contexts)
    size = (max(8.0, 2 + 0.5 * bars), 1.2 + 2.8 * len(batches))
    figure = figure_class(figsize=size, layout="constrained", dpi=160)
    panels = figure.subplots(len(batches), 1, squeeze=False)[:, 0]
    for panel, batch in zip(panels, batches, strict=True):
        _draw_panel(panel, report, batch, series)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=max(1, int(size[0] / LEGEND_COLUMN)),
        frameon=False,
        fontsize=9,
    )
    panels[-1].set_xlabel("tokens in each prompt")
    figure.suptitle(_title(report), fontsize=11)
    return figure


def _series(row: Row) -> tuple[str, str]:
    """(system, format and policy)"""
    return row.system, row.format if row.policy == DENSE_POLICY else f"{row.format} {row.policy}"


def _draw_panel(panel: Any, report: Report, batch: int, series: Sequence[tuple[str, str]]) -> None:
    """A group for each context, in it a bar for each of `series`."""
    contexts, decode = report.plan.contexts, report.plan.phase == "decode"
    rows = [row for row in report.rows if row.batch == batch]
    reached = [row.tokens_per_second_high for row in rows]
    reached += [row.byte_bound_tokens_per_second for row in rows if decode]
    top = max(reached) * (1 + LABEL_SHARE)
    width = GROUP_WIDTH / len(series)
    for place, (system, format) in enumerate(series):
        own = [row for row in rows if _series(row) == (system, format)]
        at = [group + (place + 0.5) * width - GROUP_WIDTH / 2 for group in range(len(own))]
        colour = colour_of(system, [f for s, f in series if s == system].index(format))
        _draw_bars(panel, own, at, width, color=colour, label=f"{system} {format}")
        if decode:
            label = "byte bound (100 %)" if place == len(series) - 1 else None
            _draw_bounds(panel, own, at, width, label)
        for x, row in zip(at, own, strict=True):
            _draw_label(panel, x, row, decode, top)
    panel.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
    panel.set_ylim(0, top)
    panel.set_title(f"{batch} at once" if batch > 1 else "one request", fontsize=10)
    panel.set_ylabel("tokens/s" if decode else "prompt tokens/s")
    panel.spines[["top", "right"]].set_visible(False)


def _draw_bars(
    panel: Any, rows: Sequence[Row], at: Sequence[float], width: float, **look: Any
) -> None:
    """The whiskers reach to the slowest and the fastest round."""
    speeds = [row.tokens_per_second for row in rows]
    down = [row.tokens_per_second - row.tokens_per_second_low for row in rows]
    up = [row.tokens_per_second_high - row.tokens_per_second for row in rows]
    panel.bar(at, speeds, 0.92 * width, **look)
    panel.errorbar(at, speeds, [down, up], fmt="none", ecolor="#333333", elinewidth=0.9, capsize=2)


def _draw_bounds(
    panel: Any, rows: Sequence[Row], at: Sequence[float], width: float, label: str | None
) -> None:
    bounds = [row.byte_bound_tokens_per_second for row in rows]
    edges = [x - width / 2 for x in at], [x + width / 2 for x in at]
    panel.hlines(bounds, *edges, colors="black", linewidth=1.6, label=label)


def _draw_label(panel: Any, x: float, row: Row, decode: bool, top: float) -> None:
    share = f"\n{row.percent_of_byte_bound:.0f} %" if decode else ""
    panel.annotate(
        f"{row.tokens_per_second:,.0f}{share}",
        (x, _label_height(row, top) if decode else row.tokens_per_second_high),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=7,
    )


def _label_height(row: Row, top: float) -> float:
    """Above the whisker, and above the byte bound where its line would cross the label."""
    high, bound = row.tokens_per_second_high, row.byte_bound_tokens_per_second
    return bound if high < bound < high + LABEL_SHARE * top else high


def colour_of(system: str, place: float) -> tuple[float, ...]:
    """A system's own colour, mixed with white for each further format."""
    text, share = COLOURS.get(system, "#666666"), 0.6**place
    parts = (int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return tuple(1 - share * (1 - part) for part in parts)


def _title(report: Report) -> str:
    first = report.rows[0]
    what = "decode" if report.plan.phase == "decode" else "prefill"
    ceilings = [row.read_ceiling_gb_s for row in report.rows]
    return (
        f"{first.model}: {what} on {report.threads} threads of {report.machine}\n"
        f"medians of {report.plan.rounds} alternated rounds, whiskers: slowest and fastest; "
        f"memory reads at {min(ceilings):.0f} to {max(ceilings):.0f} GB/s"
    )
