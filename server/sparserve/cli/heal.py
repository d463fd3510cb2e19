"""`sparserve heal`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from sparserve.cli.healing_display import HealingDisplay, tell_healed
from sparserve.cli.options import with_settings
from sparserve.cli.output import check_folder, err
from sparserve.config import EngineSettings
from sparserve.errors import ConfigError

if TYPE_CHECKING:
    from sparserve.compression.healing import Heal


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
    held_out: Annotated[
        int | None,
        typer.Option(
            help="Windows that are looked at and not trained on: of the texts and of what was written.",
            min=1,
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
        learning_rate=learning_rate, concentrate=concentrate, held_out=held_out, evaluations=evaluations, patience=patience, seed=seed,
    )  # fmt: skip
    with HealingDisplay() as display:
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
    tell_healed(made, how)
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
