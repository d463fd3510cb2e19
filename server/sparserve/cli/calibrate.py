"""`sparserve calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sparserve.cli.options import NO_VALUE, with_settings
from sparserve.cli.output import check_folder, counting_bar, err, out
from sparserve.config import EngineSettings
from sparserve.errors import ConfigError

if TYPE_CHECKING:
    from sparserve.sparsity.index import NeuronIndex

QUICK_WINDOWS = 8


@with_settings(EngineSettings)
def calibrate(
    settings: EngineSettings,
    text: Annotated[
        list[Path],
        typer.Option(
            help="A text file like what will be served; may be given several times.",
            metavar="<file>",
        ),
    ],
    index_file: Annotated[
        Path, typer.Option("--out", help="Write the index here.", metavar="<file>")
    ],
    name: Annotated[
        str | None,
        typer.Argument(help="The model; the same as --model.", metavar="MODEL"),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            help="Windows of text; one half is fitted on, the other held out. Default: 64, with --quick 8.",
            min=2,
            max=4096,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(help="Prompt of each window, prefilled and not scored.", min=2)
    ] = 256,
    decode_tokens: Annotated[
        int, typer.Option(help="Tokens of each window that are decoded and scored.", min=1)
    ] = 64,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", metavar=NO_VALUE, help="Measure less: a first look, not for a server."
        ),
    ] = False,
) -> None:
    """Measure what a model may leave out of its feed-forward layers, and at what cost.

    Writes an index that serve takes with --index: with it, requests can choose neurons token by token, and
    by the KL divergence they accept. An index fits the weights, the tokenizer and the format (--dtype,
    --weight-planes, …) that it was made with. A run that was interrupted goes on where it stopped.
    """
    from sparserve.calibration.pipeline import calibrate as run
    from sparserve.calibration.plan import QUICK, CalibrationPlan, Effort
    from sparserve.engine.factory import load_by_settings

    if name is not None:
        if "model" in settings.model_fields_set and settings.model != name:
            raise ConfigError(f"MODEL is {name} and --model {settings.model}; give one of them")
        settings = settings.model_copy(update={"model": name})
    check_folder("--out", index_file)
    if index_file.is_dir():
        raise ConfigError(f"--out {index_file} is a folder; name a file")
    if windows is None:
        windows = QUICK_WINDOWS if quick else 64
    effort = QUICK if quick else Effort()
    plan = CalibrationPlan(text, index_file, windows, prompt_tokens, decode_tokens, effort)
    with counting_bar() as show:
        model = load_by_settings(
            settings,
            on_tensor=lambda done, total: show("loading weights", done, total),
            on_download=show,
        )
        index = run(model, settings, plan, show)
    _print(index)
    err.print(f"index written to {index_file}")


def _print(index: NeuronIndex) -> None:
    table = Table(
        "policy", "MLP bytes", "KL", "KL p95", "top-1",
        title=f"{index.key.model} in {index.key.format}, against itself dense",
    )  # fmt: skip
    for own in sorted(index.settings, key=lambda own: own.density):
        words = [own.kind.value, "" if own.choice is None else f"by {own.choice.value}"]
        if own.choice is not None and own.shares is not None:
            words.append(f"in a core of {float(own.shares.mean()):.2f}")
        words.append("corrected" if own.correction else "")
        table.add_row(
            " ".join(filter(None, words)),
            f"{own.density:.3f}",
            f"{own.kl:.1e}",
            f"{own.kl_p95:.1e}",
            f"{own.top1:.2%}",
        )
    out.print(table)
