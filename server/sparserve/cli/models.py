"""`sparserve models`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Column, Table

from sparserve.cli.options import Command, Group
from sparserve.cli.output import err, out, progress_bars
from sparserve.errors import ModelNotFound
from sparserve.model import catalog

app = typer.Typer(
    help="List and fetch the models that can be named.", invoke_without_command=True, cls=Group
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
