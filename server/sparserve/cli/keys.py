"""`sparserve keys`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparserve.cli.options import NO_VALUE, Command, Group
from sparserve.cli.output import err, out

app = typer.Typer(help="Make keys for `serve --api-keys`.", no_args_is_help=True, cls=Group)

_DEFAULT = "0: any number. Default: the server's."


@app.callback()
def _group() -> None:
    pass  # one command alone would not be a group


@app.command("new", cls=Command)
def new(
    name: Annotated[
        str, typer.Argument(help="Of its holder, for logs and metrics: letters, digits, . _ and -")
    ],
    file: Annotated[
        Path | None,
        typer.Option(
            envvar="SPARSERVE_API_KEYS",
            help="Add the line to this file, that of `serve --api-keys`, which a running server then reads.",
        ),
    ] = None,
    control: Annotated[
        bool,
        typer.Option(
            "--control",
            metavar=NO_VALUE,
            help="Allow Drain, LoadAdapter and UnloadAdapter, and Abort of requests of other keys.",
        ),
    ] = False,
    requests_per_minute: Annotated[
        int | None, typer.Option(help=f"Calls of InferenceService a minute. {_DEFAULT}")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help=f"Prompt and new tokens a minute. {_DEFAULT}")
    ] = None,
    concurrent: Annotated[
        int | None, typer.Option(help=f"Calls of InferenceService at once. {_DEFAULT}")
    ] = None,
) -> None:
    """Make a key and print it, once: the file holds its SHA-256 alone. To revoke it, delete its line.

    The key goes to stdout, all else to stderr.
    """
    from sparserve.api.security.keys import append_key, new_key

    fields = {
        "name": name, "control": control or None, "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute, "concurrent": concurrent,
    }  # fmt: skip
    key, line = new_key({field: value for field, value in fields.items() if value is not None})
    if file is None:
        err.print("a line for the file of `serve --api-keys`:", markup=False)
        err.print(line, markup=False, soft_wrap=True, end="")
    else:
        append_key(file.expanduser(), name, line)
        err.print(
            f"{name} is in {file}; its key, which is nowhere else:", markup=False, soft_wrap=True
        )
    out.out(key, highlight=False)
