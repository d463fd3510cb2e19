"""A picture of a sweep: tokens/s of every system, and the byte bound above each."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

from sparserve.bench.peers.packages import require
from sparserve.bench.sweep import Report, Row

# Okabe and Ito's colours, which colour-blind eyes tell apart.
COLOURS = {
    "sparserve": "#D55E00",
    "llama.cpp": "#0072B2",
    "transformers": "#E69F00",
    "openvino": "#009E73",
}
GROUP_WIDTH = 0.84  # of the distance between two groups of bars


def require_matplotlib() -> None:
    """Raises ConfigError where it is missing: before the minutes that a measurement takes."""
    require("matplotlib")


def draw(report: Report) -> Any:
    """A matplotlib figure: a panel for each batch size, in it a group of bars for each context."""
    figure_class = require("matplotlib.figure").Figure  # not pyplot: nothing here has a window
    batches = report.plan.batches
    figure = figure_class(figsize=(2.2 + 4.6 * len(batches), 5.2), layout="constrained", dpi=160)
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    series = list(dict.fromkeys((row.system, row.format) for row in report.rows))
    for panel, batch in zip(panels, batches, strict=True):
        _draw_panel(panel, report, batch, series)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False
    )
    figure.suptitle(_title(report), fontsize=11)
    return figure


def _draw_panel(panel: Any, report: Report, batch: int, series: Sequence[tuple[str, str]]) -> None:
    contexts, width = report.plan.contexts, GROUP_WIDTH / len(series)
    decode = report.plan.phase == "decode"
    for place, (system, format) in enumerate(series):
        rows = [
            next(row for row in report.rows if _names(row) == (system, format, batch, context))
            for context in contexts
        ]
        at = [group + (place + 0.5) * width - GROUP_WIDTH / 2 for group in range(len(rows))]
        speeds = [row.tokens_per_second for row in rows]
        reach = [
            [row.tokens_per_second - row.tokens_per_second_low for row in rows],
            [row.tokens_per_second_high - row.tokens_per_second for row in rows],
        ]
        colour = _colour(system, [f for s, f in series if s == system].index(format))
        bars = panel.bar(at, speeds, 0.92 * width, color=colour, label=f"{system} {format}")
        panel.errorbar(at, speeds, reach, fmt="none", ecolor="#333333", elinewidth=0.9, capsize=2)
        shares = [f"\n{row.percent_of_byte_bound:.0f} %" if decode else "" for row in rows]
        texts = [f"{speed:.0f}{share}" for speed, share in zip(speeds, shares, strict=True)]
        panel.bar_label(bars, texts, fontsize=7, label_type="center", color="white")
        if decode:
            bounds = [row.byte_bound_tokens_per_second for row in rows]
            label = "byte bound" if place == len(series) - 1 else None
            edges = [x - width / 2 for x in at], [x + width / 2 for x in at]
            panel.hlines(bounds, *edges, colors="black", linewidth=1.6, label=label)
    panel.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
    panel.set_xlabel("tokens in the prompt" if not decode else "tokens before the new ones")
    panel.set_title(f"{batch} at once" if batch > 1 else "one request", fontsize=10)
    panel.set_ylabel("tokens/s" if decode else "prompt tokens/s")
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(y=0.08)


def _names(row: Row) -> tuple[str, str, int, int]:
    return row.system, row.format, row.batch, row.context


def _colour(system: str, place: int) -> tuple[float, float, float]:
    """A system's own colour, lighter for each further format."""
    text = COLOURS.get(system, "#666666")
    red, green, blue = (int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    return colorsys.hls_to_rgb(hue, min(lightness + 0.16 * place, 0.85), saturation)


def _title(report: Report) -> str:
    first = report.rows[0]
    what = "decode" if report.plan.phase == "decode" else "prefill"
    ceilings = [row.read_ceiling_gb_s for row in report.rows]
    return (
        f"{first.model}: {what} on {report.threads} threads of {report.machine}\n"
        f"medians of {report.plan.rounds} alternated rounds, whiskers: slowest and fastest; "
        f"memory reads at {min(ceilings):.0f} to {max(ceilings):.0f} GB/s"
    )
