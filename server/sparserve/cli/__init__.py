"""The `sparserve` command.

Modules here import what loads torch inside the functions that need it: `--help`, and commands that
ask a server, start in half a second instead of several.
"""

from __future__ import annotations

import sparserve.cli.environment  # isort: skip  # noqa: F401  (before gRPC: it sets what gRPC logs)

import sys

import typer

from sparserve import __version__
from sparserve.cli import (
    bench,
    bench_pruning,
    bench_serve,
    calibrate,
    chat,
    compress,
    demo,
    evaluate,
    gateway,
    generate,
    heal,
    keys,
    models,
    report,
    serve,
)
from sparserve.cli.options import NO_VALUE, Command, Group
from sparserve.cli.output import fail
from sparserve.errors import SparserveError

app = typer.Typer(
    name="sparserve",
    cls=Group,
    help="Serve Llama-family models over gRPC.\n\nStart with `sparserve demo`: it fetches a small real "
    "model, serves it and talks to it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("demo", cls=Command)(demo.demo)
app.command("serve", cls=Command)(serve.serve)
app.command("gateway", cls=Command)(gateway.gateway)
app.command("chat", cls=Command)(chat.chat)
app.command("generate", cls=Command)(generate.generate)
app.command("eval", cls=Command)(evaluate.evaluate)
app.command("compress", cls=Command)(compress.compress)
app.command("heal", cls=Command)(heal.heal)
app.command("calibrate", cls=Command)(calibrate.calibrate)
app.command("report", cls=Command)(report.report)
bench.app.command("pruning", cls=Command)(bench_pruning.pruning)
bench.app.command("serve", cls=Command)(bench_serve.serve)
bench.app.command("plot-serve", cls=Command)(bench_serve.plot_serve)
app.add_typer(bench.app, name="bench")
app.add_typer(keys.app, name="keys")
app.add_typer(models.app, name="models")


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False,
        "--version",
        metavar=NO_VALUE,
        callback=_version,
        is_eager=True,
        help="Print the version.",
    ),
) -> None:
    pass


def main() -> None:
    """Entry point: errors meant for the user become one line on stderr and exit status 1."""
    try:
        app()
    except SparserveError as error:
        fail(error)
        sys.exit(1)
