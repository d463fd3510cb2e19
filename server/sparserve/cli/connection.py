"""Options of the commands that talk to a server: how the connection is secured, and the key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from sparserve.client.connection import Security
from sparserve.errors import ConfigError

_PANEL = "Connection"

Server = Annotated[
    str | None,
    typer.Option(
        help="host:port of a running server, grpcs://host:port over TLS; without it the model runs here."
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        envvar="SPARSERVE_API_KEY",
        help="A key of the server's, where it asks for one. Other users of this machine see flags: better in the environment.",
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="PEM file with the authorities to trust, in place of the system's; the connection is then TLS.",
    ),
]
ClientCert = Annotated[
    Path | None,
    typer.Option(
        "--client-cert",
        rich_help_panel=_PANEL,
        help="PEM file with this client's certificate, for servers with --tls-client-ca.",
    ),
]
ClientKey = Annotated[
    Path | None,
    typer.Option("--client-key", rich_help_panel=_PANEL, help="PEM file with its private key."),
]


@dataclass(frozen=True, slots=True)
class Connection:
    """What a client is made of."""

    target: str
    security: Security = field(repr=False)


def connection(
    server: str | None,
    api_key: str | None,
    tls_ca: Path | None,
    client_cert: Path | None,
    client_key: Path | None,
) -> Connection | None:
    """None without a server. Raises ConfigError where flags are for one, and none is given."""
    files = {"--tls-ca": tls_ca, "--client-cert": client_cert, "--client-key": client_key}
    if server is not None:
        return Connection(
            server,
            {"api_key": api_key, "tls_ca": tls_ca, "tls_cert": client_cert, "tls_key": client_key},
        )
    if flags := ", ".join(flag for flag, file in files.items() if file is not None):
        raise ConfigError(f"{flags}: for a running server; give --server too")
    return None
