"""The picture of a server under load: latency over throughput, a line for each target."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparserve.bench.peers.packages import require
from sparserve.bench.plot import COLOURS
from sparserve.errors import ConfigError

# Of targets whose names have no colour of their own.
OTHERS = ("#CC79A7", "#56B4E9", "#F0E442", "#666666")
LATENCIES = {"ttft": "time to first token", "itl": "between two pieces of an answer (ITL)"}
PANEL_SIZE = (6.4, 5.2)  # inches


def read_reports(files: Iterable[Path]) -> dict[str, Any]:
    """One of all: the first, with the rows of the others. Raises ConfigError of what is no report of `bench serve`."""
    reports = [_read(file) for file in files]
    if not reports:
        raise ConfigError("there is no report to draw")
    return {**reports[0], "rows": [row for report in reports for row in report["rows"]]}


def draw_serve(report: dict[str, Any]) -> Any:
    """A matplotlib figure of a report as JSON: a panel for TTFT and one for ITL, the median in a full line and the
    highest percentile in a dashed one.
    """
    figure_class = require("matplotlib.figure").Figure  # not pyplot: nothing here has a window
    width, height = PANEL_SIZE
    figure = figure_class(figsize=(len(LATENCIES) * width, height), layout="constrained", dpi=160)
    panels = figure.subplots(1, len(LATENCIES), squeeze=False)[0]
    names = list(dict.fromkeys(row["target"] for row in report["rows"]))
    for panel, (name, title) in zip(panels, LATENCIES.items(), strict=True):
        for place, target in enumerate(names):
            rows = [row for row in report["rows"] if row["target"] == target]
            _draw_target(panel, rows, name, target, _colour(target, place))
        panel.set_yscale("log")
        panel.set_xlim(left=0)
        panel.set_xlabel("output tokens/s, all requests together")
        panel.set_ylabel(f"{title}, ms")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, which="both")
    panels[0].legend(frameon=False, fontsize=9)
    figure.suptitle(_title(report), fontsize=10)
    return figure


def _draw_target(
    panel: Any, rows: Sequence[dict[str, Any]], latency: str, target: str, colour: str
) -> None:
    """Loads are joined in the order that they were given in."""
    rows = [row for row in rows if row["summary"][latency] is not None]
    if not rows:
        return
    speeds = [row["summary"]["output_tokens_per_second"] for row in rows]
    found = [row["summary"][latency] for row in rows]
    highest = max(found[0]["percentiles"], key=float)
    medians = [latency["median"] for latency in found]
    tails = [latency["percentiles"][highest] for latency in found]
    panel.plot(speeds, medians, "o-", color=colour, markersize=5, label=f"{target}, median")
    panel.plot(speeds, tails, "s--", color=colour, markersize=4, linewidth=1, label=f"p{highest}")
    for row, speed, median in zip(rows, speeds, medians, strict=True):
        panel.annotate(
            row["label"].removesuffix(" at once"),
            (speed, median),
            xytext=(0, -11),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )


def _colour(target: str, place: int) -> str:
    return COLOURS.get(target, OTHERS[place % len(OTHERS)])


def _title(report: dict[str, Any]) -> str:
    ceilings = report["read_ceilings_gb_s"]
    memory = (
        f"; memory reads at {min(ceilings):.0f} to {max(ceilings):.0f} GB/s" if ceilings else ""
    )
    plan = report["plan"]
    return (
        f"Servers under load: {plan['dataset']}\n{report['machine']}; labels: requests at once, or a second; "
        f"rounds: {plan['rounds']}{memory}"
    )


def _read(file: Path) -> dict[str, Any]:
    """Raises ConfigError."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _ = found["plan"]["dataset"], found["plan"]["rounds"], found["machine"]
        for row in found["rows"]:
            _ = row["target"], row["label"], row["summary"]["output_tokens_per_second"]
            _ = [row["summary"][latency] for latency in LATENCIES]
        _ = len(found["read_ceilings_gb_s"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{file} is no report of sparserve bench serve: {error!r}") from error
    return found
