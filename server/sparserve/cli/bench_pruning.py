"""`sparserve bench pruning`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Column, Table

from sparserve import __version__
from sparserve.cli.bench import JsonFile, PngFile, check_files, refuse_own_limits, save_picture
from sparserve.cli.options import with_settings
from sparserve.cli.output import counting_bar, out, write_json
from sparserve.config import EngineSettings
from sparserve.errors import ConfigError

if TYPE_CHECKING:
    from sparserve.bench.pruning import Report, Row
    from sparserve.model.loader import LoadedModel


@with_settings(EngineSettings)
def pruning(
    settings: EngineSettings,
    text: Annotated[
        Path,
        typer.Argument(
            help="A text file to score on, which nothing is calibrated on; --compress-text names those to calibrate on."
        ),
    ],
    shares: Annotated[
        str, typer.Option(help="Shares of the parameters to remove, comma-separated.")
    ] = "0.1,0.2,0.3",
    what: Annotated[
        str,
        typer.Option(
            help="Of which they are shares, comma-separated: all parameters, taken from neurons_first or from heads and neurons together; those of attention (heads), of the feed-forward layers (mlp)."
        ),
    ] = "neurons_first,together",
    criteria: Annotated[
        str, typer.Option(help="What tells what matters, comma-separated.")
    ] = "amp,amp_w,wanda,flap,magnitude,random",
    allocations: Annotated[
        str, typer.Option(help="How layers share the loss, comma-separated.")
    ] = "uniform,adaptive",
    restores: Annotated[
        str, typer.Option(help="What makes up for it, comma-separated.")
    ] = "none,bias,least_squares",
    head_unit: Annotated[
        str,
        typer.Option(
            help="groups: a KV head with its query heads; queries: a query head of each KV head."
        ),
    ] = "groups",
    calibration_windows: Annotated[
        int,
        typer.Option(
            help="Windows to calibrate on; each fourth one decides what is restored.", min=4
        ),
    ] = 32,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of each of them.", min=2)] = 512,
    windows: Annotated[int, typer.Option(help="Windows to score.", min=2)] = 40,
    prompt_tokens: Annotated[
        int, typer.Option(help="Prompt of each window, prefilled and not scored.", min=1)
    ] = 256,
    decode_tokens: Annotated[
        int, typer.Option(help="Tokens of each window that are decoded and scored.", min=1)
    ] = 64,
    json_file: JsonFile = None,
    png: PngFile = None,
) -> None:
    """Measure what pruning costs: each way of a grid, in bfloat16, by KL to the original in float32.

    Tells which criterion, allocation and restoration to give a recipe for this model. --json is written after each way.
    Speeds depend on the share alone: `sparserve report` measures them, of folders that `sparserve compress` made.
    """
    from sparserve.bench.evaluation import Plan as Scoring
    from sparserve.bench.policies import parse_policies
    from sparserve.bench.pruning import DTYPE, Plan, Report, measure_pruning
    from sparserve.bench.text import refuse_calibration_text
    from sparserve.engine.factory import load_by_settings
    from sparserve.engine.formats import with_dtype
    from sparserve.model.text import hashes_of, read_windows

    texts = settings.compress_texts
    settings = settings.model_copy(update={"compress_text": ""})
    if settings.compresses:
        raise ConfigError(
            "--compress and --prune are for a server; here --shares say what is tried"
        )
    refuse_own_limits(settings)
    check_files(json_file, png)
    scoring = Scoring(
        text, [DTYPE], parse_policies("dense"), None, windows, prompt_tokens, decode_tokens
    )
    plan = Plan(
        scoring, [_share(word) for word in _words(shares)], _words(what), _words(criteria), _words(allocations),
        _words(restores), head_unit,
    )  # fmt: skip
    plan.ways()
    if not texts:
        raise ConfigError("give --compress-text, a text like what will be served to calibrate on")
    refuse_calibration_text(text, "pruned models", hashes_of(texts))
    rows: list[Row] = []
    try:
        with counting_bar() as show:

            def load(name: str, dtype: str) -> LoadedModel:
                return load_by_settings(
                    with_dtype(settings, dtype).model_copy(update={"model": name}),
                    on_tensor=lambda done, total: show("loading weights", done, total),
                    on_download=show,
                )

            model = load(settings.model, DTYPE)
            read = read_windows(
                model, texts, calibration_windows, calibration_tokens, ("--calibration-windows", "--calibration-tokens")
            )  # fmt: skip
            report = Report(
                __version__, shlex.join(sys.argv), model.name, text.name, [own.name for own in texts], read.token_ids.numel(),
                windows, prompt_tokens, decode_tokens, rows,
            )  # fmt: skip
            for row in measure_pruning(settings, plan, model, read.token_ids, load, show):
                rows.append(row)
                if json_file is not None:
                    json_file.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    finally:  # those that there are, where a later way fails or somebody waits no longer
        if rows:
            _tell(report, json_file, png)


def _tell(report: Report, json_file: Path | None, png: Path | None) -> None:
    from sparserve.bench.plot_pruning import draw_pruning

    _print(report)
    write_json(json_file, report.as_json())
    if png is not None:
        save_picture(draw_pruning(report), png)


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",")))


def _share(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ConfigError(f"--shares has {word!r}; give numbers such as 0.1,0.2") from None


def _print(report: Report) -> None:
    table = Table(
        "of", "cut", "criterion", "allocation", Column("restored by", no_wrap=True), "KL, 95 % interval",
        "top-1", "ppl",
        title=f"{report.model} pruned, against the original in float32, {report.windows} windows",
        box=box.SIMPLE, pad_edge=False,
    )  # fmt: skip
    for row in report.rows:
        own = row.quality
        table.add_row(
            row.what,
            f"{row.share:.0%}",
            row.how.criterion,
            row.how.allocation,
            row.how.restore,
            f"{own.kl:.2g} ({own.kl_low:.2g}, {own.kl_high:.2g})",
            f"{own.top1:.1%}",
            f"{own.perplexity:.2f}",
        )
    out.print(table)
