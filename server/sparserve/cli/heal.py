"""`sparserve heal`."""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sparserve.cli.options import with_settings
from sparserve.cli.output import check_folder, err, out
from sparserve.config import EngineSettings
from sparserve.errors import ConfigError

if TYPE_CHECKING:
    from sparserve.compression.healing import Heal
    from sparserve.healing import training
    from sparserve.healing.pipeline import HealedFolder

BARS = "▁▂▃▄▅▆▇█"
CURVE = 32  # bars


@with_settings(EngineSettings)
def heal(
    settings: EngineSettings,
    out_folder: Annotated[
        Path,
        typer.Option("--out", help="The folder to make; --model takes it.", metavar="<folder>"),
    ],
    name: Annotated[
        str | None,
        typer.Argument(help="The model to heal; the same as --model.", metavar="MODEL"),
    ] = None,
    through: Annotated[
        str,
        typer.Option(
            help="The policy that will serve: dense for a model that is pruned or rounded, core:0.5 for one whose requests "
            "read a core of half of the neurons.",
            metavar="POLICY",
        ),
    ] = "dense",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="A text file like what will be served, to learn from beside what the original model writes; may be given several times.",
            metavar="<file>",
        ),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            help="The model to learn from. Default: what MODEL was made of, or MODEL itself.",
            metavar="MODEL",
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on, in all.", min=1)] = None,
    generate: Annotated[
        int | None,
        typer.Option(
            help="Windows of text that the original writes itself before; 0: learn from --text alone.",
            min=0,
        ),
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a window.", min=16)] = None,
    batch: Annotated[int | None, typer.Option(help="Windows of a step.", min=1)] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of what is added to matrices of 16 bits, and merged into them. Integers learn through the "
            "low-rank terms that their recipe gave them.",
            min=0,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="The highest; it rises first and then falls.", min=0)
    ] = None,
    concentrate: Annotated[
        float | None,
        typer.Option(
            help="Weight of a term that makes few neurons carry most of a token's activations.",
            min=0,
        ),
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(help="Looks at held-out windows during the run.", min=1)
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Looks without a better one that end the run.", min=1)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is drawn.", min=0)] = None,
    png_file: Annotated[
        Path | None, typer.Option("--png", help="Draw the run's curve here.", metavar="<file>")
    ] = None,
) -> None:
    """Teach a pruned, rounded or sparsely read model to answer as the original did (self-distillation).

    The original model writes text, and the student learns its logits on it and on --text, through the policy that will
    serve. What is learned becomes part of the matrices, norms and biases, so it costs nothing when it is served. Text that
    is held out tells when to stop; the best state is written. A run that was interrupted goes on from its last look.
    """
    from sparserve.bench.plot import require_matplotlib
    from sparserve.healing.pipeline import heal as run
    from sparserve.healing.plot import draw_looks

    if name is not None:
        if "model" in settings.model_fields_set and settings.model != name:
            raise ConfigError(f"MODEL is {name} and --model {settings.model}; give one of them")
        settings = settings.model_copy(update={"model": name})
    if png_file is not None:
        check_folder("--png", png_file)
        require_matplotlib()
    how = _how(
        through=through, tokens=tokens, generated=generate, window=window, batch=batch, rank=rank,
        learning_rate=learning_rate, concentrate=concentrate, evaluations=evaluations, patience=patience, seed=seed,
    )  # fmt: skip
    with _Display() as display:
        try:
            made = run(
                settings.model,
                how,
                text or [],
                out_folder,
                settings,
                original=original,
                on_stage=display.stage,
                on_step=display.step,
            )
        except KeyboardInterrupt:
            err.print("interrupted; the same command goes on from the last look")
            raise
    _print(made, how)
    if png_file is not None:
        draw_looks(made.healed.looks, f"{made.info.source.name} through {how.through}").savefig(
            png_file
        )
        err.print(f"curve written to {png_file}")
    err.print(f"written to {out_folder}; next:", markup=False, soft_wrap=True)
    err.print(
        f"  sparserve serve --model {shlex.quote(str(out_folder))}", markup=False, soft_wrap=True
    )


def _how(**given: object) -> Heal:
    """Raises ConfigError."""
    from sparserve.compression.healing import Heal

    try:
        return Heal.model_validate({key: own for key, own in given.items() if own is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where}: {first['msg']}" if where else str(first["msg"])) from error


class _Display:
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

    def __enter__(self) -> _Display:
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
        if progress.loss is None:
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


def _print(made: HealedFolder, how: Heal) -> None:
    healed = made.healed
    before, best = healed.looks[0].held_out, healed.best
    ended = "diverged" if healed.diverged else "ended"
    out.print(
        f"KL to the original on held-out windows, through {how.through}: {before:.3g} before, {best.held_out:.3g} after "
        f"{best.step} steps ({best.held_out / before:.2f} of it); the run {ended} at step {healed.steps} of {how.steps}, "
        f"{healed.steps * how.batch * how.window:,} tokens; {made.seconds:.0f} s",
        soft_wrap=True,
    )
