"""The curve of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparserve.bench.peers.packages import require
from sparserve.bench.plot import COLOURS
from sparserve.healing.state import Look


def draw_looks(looks: Sequence[Look], title: str) -> Any:
    """A matplotlib figure: KL over steps, of what was trained on and of what was held out."""
    figure = require("matplotlib.figure").Figure(figsize=(7.2, 4.4), layout="constrained", dpi=160)
    panel = figure.subplots()
    steps = [own.step for own in looks]
    trained = [own for own in looks if own.training is not None]
    panel.plot(
        [own.step for own in trained], [own.training for own in trained],
        color=COLOURS["openvino"], label="training text, mean since the last look",
    )  # fmt: skip
    panel.plot(
        steps, [own.held_out for own in looks],
        color=COLOURS["sparserve"], marker="o", markersize=4, label="held-out text",
    )  # fmt: skip
    best = min(looks, key=lambda own: own.objective)
    panel.annotate(
        f"{best.held_out:.3g}", (best.step, best.held_out),
        textcoords="offset points", xytext=(0, 8), ha="center", fontsize=9,
    )  # fmt: skip
    panel.set_ylim(bottom=0)
    panel.set_xlabel("steps")
    panel.set_ylabel("KL to the original, nats per token")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, fontsize=9)
    panel.set_title(title, fontsize=10)
    return figure
