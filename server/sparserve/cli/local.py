"""A server of this process's own, for commands that talk to one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from sparserve.cli.connection import Connection
from sparserve.cli.output import progress_bars
from sparserve.client import AsyncClient
from sparserve.config import EngineSettings, ServerSettings, load_settings
from sparserve.errors import ConfigError

if TYPE_CHECKING:
    from sparserve.api.server import Server
    from sparserve.engine.factory import BuiltEngine


def server_settings(settings: EngineSettings | None = None) -> ServerSettings:
    """For a server on free ports of the loopback interface: what the flags of a command and the
    environment say of the engine."""
    flags = (
        {name: getattr(settings, name) for name in settings.model_fields_set} if settings else {}
    )
    own = {"host": "127.0.0.1", "port": 0, "metrics_host": "", "metrics_port": 0}
    # Its one client is this process, whatever the environment says for other servers.
    unguarded = dict.fromkeys(("tls_cert", "tls_key", "tls_client_ca", "api_keys"), "")
    return load_settings(ServerSettings, {**flags, **own, **unguarded})


def refuse_engine_flags(settings: EngineSettings) -> None:
    """Raises ConfigError where a command with --server was given flags of a model that runs here."""
    if settings.model_fields_set:
        flags = ", ".join(
            f"--{name.replace('_', '-')}" for name in sorted(settings.model_fields_set)
        )
        raise ConfigError(f"{flags}: for a model that runs here; a --server has its own settings")


def build_with_bars(settings: EngineSettings) -> BuiltEngine:
    """Load the model, with bars for what takes long. Raises ModelError or ConfigError."""
    from sparserve.engine.factory import build_engine

    with progress_bars() as bars:
        return build_engine(
            settings, on_tensor=bars.on_tensor, on_layer=bars.on_layer, on_download=bars.on_download
        )


@asynccontextmanager
async def connected(to: Connection | None, settings: EngineSettings) -> AsyncIterator[AsyncClient]:
    """A client of the server there, or of one of our own."""
    if to is not None:
        refuse_engine_flags(settings)
        async with AsyncClient(to.target, **to.security) as client:
            yield client
        return
    own = server_settings(settings)
    async with (
        local_server(build_with_bars(own), own) as server,
        AsyncClient(f"{own.host}:{server.port}") as client,
    ):
        yield client


@asynccontextmanager
async def local_server(built: BuiltEngine, settings: ServerSettings) -> AsyncIterator[Server]:
    """A real server over `built`; its address is `settings.host` and `Server.port`."""
    from sparserve.api.server import Server

    server = Server(built.engine, built.model_name, settings)
    await server.start()
    try:
        yield server
    finally:
        await server.drain_and_stop()
