"""`sparserve eval`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sparserve.bench.quality import Quality, Scored, Window, cut_windows, measure
from sparserve.bench.scored import Original, ServedModel
from sparserve.cli.options import with_settings
from sparserve.cli.output import counting_bar, err, out, progress_bars
from sparserve.config import EngineSettings
from sparserve.engine.engine import Engine
from sparserve.engine.factory import assemble_engine
from sparserve.errors import ConfigError
from sparserve.model.loader import DTYPES, LoadedModel, load_model

WINDOWS_AT_ONCE = 4


@with_settings(EngineSettings)
def evaluate(
    text: Annotated[Path, typer.Argument(help="A text file, long enough for all windows.")],
    settings: EngineSettings,
    formats: Annotated[
        str,
        typer.Option(
            help=f"Formats of the weights to score, comma-separated: {', '.join(DTYPES)}. Default: --dtype's."
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
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows here as JSON.")
    ] = None,
) -> None:
    """Measure how far a model as served is from the original in float32.

    The text is cut into windows: a prompt, and a continuation that is fed token by token through decode.
    Tells the mean KL divergence with its 95 % interval, top-1 agreement, perplexity and the bytes that
    a decode step reads.
    """
    names = [name.strip() for name in formats.split(",")] if formats else [settings.dtype]
    if unknown := [name for name in names if name not in ("auto", *DTYPES)]:
        raise ConfigError(
            f"no format is named {', '.join(unknown)}; there are: {', '.join(DTYPES)}"
        )
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise ConfigError(f"the folder of --json {json_file} does not exist")
    reference = _load(original or settings.model, "float32")
    cut = cut_windows(_tokens(text, reference), windows, prompt_tokens, decode_tokens)
    settings = settings.model_copy(update={"max_context": prompt_tokens + decode_tokens})
    systems: list[Scored] = []
    for name in names:
        model = reference if name == "float32" and original is None else _load(settings.model, name)
        _check_vocabulary(model, reference)
        systems.append(_served(model, settings, cut))
    judge = Original(_engine(reference, settings).backend)
    with counting_bar() as on_progress:
        rows = measure(judge.logits, systems, cut, on_progress, WINDOWS_AT_ONCE)
    _print(settings.model, rows)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        err.print(f"rows written to {json_file}")


def _tokens(path: Path, model: LoadedModel) -> list[int]:
    """Raises ConfigError where the file cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
    return list(model.tokenizer.encode(text, add_special_tokens=False).ids)


def _load(name: str, dtype: str) -> LoadedModel:
    with progress_bars() as bars:
        return load_model(name, dtype=dtype, on_tensor=bars.on_tensor, on_download=bars.on_download)


def _engine(model: LoadedModel, settings: EngineSettings) -> Engine:
    """With a KV cache for the few windows that are scored together."""
    seats = {"max_running": WINDOWS_AT_ONCE, "max_choices": 1}
    tokens = max(settings.max_batched_tokens, WINDOWS_AT_ONCE)
    return assemble_engine(
        model, settings.model_copy(update={**seats, "max_batched_tokens": tokens})
    ).engine


def _served(model: LoadedModel, settings: EngineSettings, windows: list[Window]) -> Scored:
    engine = _engine(model, settings)
    return ServedModel(engine.backend, model.weights, windows, engine.limits.max_batched_tokens)


def _check_vocabulary(model: LoadedModel, reference: LoadedModel) -> None:
    ours, theirs = model.config.vocab_size, reference.config.vocab_size
    if ours != theirs:
        raise ConfigError(
            f"{model.name} has a vocabulary of {ours} tokens, {reference.name} one of {theirs}: "
            "their distributions cannot be compared"
        )


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
