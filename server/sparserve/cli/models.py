"""`sparserve models`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from sparserve.cli.options import Command, Group
from sparserve.cli.output import err, out, progress_bars
from sparserve.errors import ConfigError, ModelNotFound
from sparserve.model import catalog

app = typer.Typer(
    help="List and fetch the models that can be named; write any as a GGUF file.",
    invoke_without_command=True,
    cls=Group,
)


@app.callback()
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_models()


@app.command("list", cls=Command)
def list_models() -> None:
    """List the models that can be named, and which of them are here."""
    table = Table(
        Column("name", no_wrap=True),
        Column("what", overflow="fold"),
        "size",
        "licence",
        "cached",
        title=f"cache: {catalog.cache_dir()}",
    )
    for entry in catalog.CATALOG.values():
        size, cached = f"{entry.size / 1e6:.0f} MB", "yes" if entry.is_cached else "no"
        table.add_row(entry.name, entry.description, size, entry.licence, cached)
    out.print(table)
    out.print(
        "`--model` also takes a Hugging Face folder, a .gguf file, or the id org/name of a model in "
        "the Hugging Face cache."
    )


@app.command("fetch", cls=Command)
def fetch(
    name: Annotated[str, typer.Argument(help="A name that `sparserve models list` shows.")],
) -> None:
    """Download a model into the cache and verify it; nothing happens where it is there already."""
    if name not in catalog.CATALOG:
        raise ModelNotFound(f"no model is named {name!r}; there are: {', '.join(catalog.CATALOG)}")
    with progress_bars() as bars:
        path = catalog.fetch(name, bars.on_download)
    err.print(f"{name} is at {path}", markup=False, soft_wrap=True)


@app.command("export", cls=Command)
def export(
    model: Annotated[str, typer.Argument(help="What --model of the other commands takes.")],
    file: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    dtype: Annotated[
        str, typer.Option(help="Data type of the matrices: float32, bfloat16 or float16.")
    ] = "float32",
) -> None:
    """Write a model as a GGUF file, which llama.cpp can load and quantize."""
    from sparserve.bench.to_gguf import GGUF_DTYPES, write_gguf
    from sparserve.model.loader import load_model

    if file.suffix != ".gguf":
        raise ConfigError(f"{file} is no name of a GGUF file; one ends in .gguf")
    if dtype not in GGUF_DTYPES:
        raise ConfigError(f"no dtype is named {dtype}; there are: {', '.join(GGUF_DTYPES)}")
    with progress_bars() as bars:
        loaded = load_model(
            model, dtype=dtype, on_tensor=bars.on_tensor, on_download=bars.on_download
        )
    write_gguf(loaded, file, dtype)
    err.print(f"{loaded.name} is at {file}", markup=False, soft_wrap=True)
