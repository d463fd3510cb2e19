"""`sparserve eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.table import Table

from sparserve.cli.options import NO_VALUE, with_settings
from sparserve.cli.output import check_json_file, out, progress_bars, write_json
from sparserve.config import Dtype, EngineSettings
from sparserve.errors import ConfigError

if TYPE_CHECKING:
    from sparserve.bench.quality import Quality
    from sparserve.model.loader import LoadedModel

FORMATS = get_args(Dtype)


@with_settings(EngineSettings)
def evaluate(
    text: Annotated[Path, typer.Argument(help="A text file, long enough for all windows.")],
    settings: EngineSettings,
    formats: Annotated[
        str,
        typer.Option(
            help=f"Formats of the weights to score, comma-separated: {', '.join(FORMATS)}. Default: --dtype's."
        ),
    ] = "",
    original: Annotated[
        str | None,
        typer.Option(help="The model to compare with, always in float32. Default: --model itself."),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows to score.", min=2)] = 200,
    prompt_tokens: Annotated[
        int, typer.Option(help="Prompt of each window, prefilled and not scored.", min=1)
    ] = 256,
    decode_tokens: Annotated[
        int, typer.Option(help="Tokens of each window that are decoded and scored.", min=1)
    ] = 64,
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache",
            metavar=NO_VALUE,
            help="Compute the original anew, and keep nothing of it for later runs.",
        ),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows here as JSON.")
    ] = None,
) -> None:
    """Measure how far a model as served is from the original in float32.

    The text is cut into windows: a prompt, and a continuation that is fed token by token through decode.
    Tells the mean KL divergence with its 95 % interval, top-1 agreement, perplexity and the bytes that
    a decode step reads.
    """
    from sparserve.bench.evaluation import Plan, evaluate_formats
    from sparserve.engine.factory import load_by_settings

    names = [name.strip() for name in formats.split(",")] if formats else [settings.dtype]
    if unknown := [name for name in names if name not in FORMATS]:
        raise ConfigError(
            f"no format is named {', '.join(unknown)}; there are: {', '.join(FORMATS)}"
        )
    check_json_file(json_file)
    plan = Plan(text, names, original, windows, prompt_tokens, decode_tokens, cache=not no_cache)
    with progress_bars() as bars:  # one display for loading and scoring

        def load(name: str, dtype: str) -> LoadedModel:
            own = settings.model_copy(update={"model": name, "dtype": dtype})
            return load_by_settings(own, on_tensor=bars.on_tensor, on_download=bars.on_download)

        rows = evaluate_formats(settings, plan, load, bars.on_download)
    _print(settings.model, rows)
    write_json(json_file, [asdict(row) for row in rows])


def _print(model: str, rows: list[Quality]) -> None:
    table = Table(
        "served", "MB/token", "KL, 95 % interval", "KL p95", "top-1", "perplexity",
        title=f"{model} against the original in float32, {rows[0].windows} windows",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            f"{row.format} {row.policy}",
            f"{row.bytes_per_token / 1e6:.1f}",
            f"{row.kl:.1e} ({row.kl_low:.1e}, {row.kl_high:.1e})",
            f"{row.kl_p95:.1e}",
            f"{row.top1:.2%}",
            f"{row.perplexity:.2f}",
        )
    out.print(table)
