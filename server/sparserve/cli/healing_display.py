"""How a healing run is shown."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sparserve.cli.output import err, out

if TYPE_CHECKING:
    from sparserve.compression.healing import Heal
    from sparserve.healing import training
    from sparserve.healing.pipeline import HealedFolder

BARS = "▁▂▃▄▅▆▇█"
CURVE = 32  # bars


class HealingDisplay:
    """A bar for each stage, and of the training its curve; without a terminal a line for each look."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(
            *columns, console=err, transient=True, disable=not err.is_terminal
        )
        self._tasks: dict[str, TaskID] = {}
        self._losses: list[float] = []
        self._held_out = ""

    def __enter__(self) -> HealingDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, what: str, done: int, total: int, told: str = "") -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=None, told="")
        self._progress.update(self._tasks[what], completed=done, total=total or None, told=told)

    def step(self, progress: training.Progress) -> None:
        if (look := progress.look) is not None:
            self._held_out = f"KL held out {look.held_out:.3f}"
            trained = "" if look.training is None else f", trained on {look.training:.3f}"
            speed = f", {progress.tokens_per_second:.0f} tokens/s" if progress.step else ""
            err.print(f"step {progress.step} of {progress.steps}: {self._held_out}{trained}{speed}")
        if progress.loss is None or not math.isfinite(progress.loss) or self._progress.disable:
            return
        self._losses.append(progress.loss)
        told = f"{self._held_out}, now {progress.loss:.3f}, {progress.tokens_per_second:.0f} tokens/s {curve(self._losses)}"
        self.stage("healing", progress.step, progress.steps, told)


def curve(values: list[float], width: int = CURVE) -> str:
    """Means of `width` parts of `values`, as bars."""
    count = min(width, len(values))
    ends = [len(values) * n // count for n in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(ends)]
    least, most = min(means), max(means)
    step = (most - least) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((own - least) / step)] for own in means)


def tell_healed(made: HealedFolder, how: Heal) -> None:
    healed = made.healed
    before, best = healed.looks[0].held_out, healed.best
    ended = "diverged" if healed.diverged else "ended"
    # A model that is concentrated may answer as its original does at first.
    ratio = f" ({best.held_out / before:.2f} of it)" if before > 0 else ""
    out.print(
        f"KL to the original on held-out windows, through {how.through}: {before:.3g} before, {best.held_out:.3g} after "
        f"{best.step} steps{ratio}; the run {ended} at step {healed.steps} of {how.steps}, "
        f"{healed.steps * how.batch * how.window:,} tokens; {made.seconds:.0f} s",
        soft_wrap=True,
    )
