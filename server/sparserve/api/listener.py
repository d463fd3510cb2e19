"""A gRPC server at one address, with what holds for all of ours: limits, keep-alive, log lines, statuses."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from sparserve.api.addresses import Address, stop_listening
from sparserve.api.interceptors import AccessLogInterceptor, ErrorInterceptor
from sparserve.config import ServerSettings

Interceptor = grpc.aio.ServerInterceptor


def grpc_options(settings: ServerSettings) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        # Between the two gRPC would refuse by chance.
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
        # Who connects and says nothing holds the connection no longer.
        ("grpc.server_handshake_timeout_ms", 20_000),
        # Keep-alive pings of a client waiting for a long call must not end in "Too many pings".
        ("grpc.http2.max_ping_strikes", 0),
        # Two servers on one port would each get a share of the connections: a port in use is an error.
        ("grpc.so_reuseport", 0),
        # A client that vanishes without closing its connection is noticed, and its requests end.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
    if settings.max_connection_age:
        options.append(("grpc.max_connection_age_ms", int(settings.max_connection_age * 1000)))
    if settings.max_connection_grace:
        grace = int(settings.max_connection_grace * 1000)
        options.append(("grpc.max_connection_age_grace_ms", grace))
    return options


class Listener:
    """Add services to `server`, then `start` once and `stop` once, on the running event loop."""

    def __init__(
        self,
        address: Address,
        settings: ServerSettings,
        *,
        interceptors: Sequence[Interceptor] = (),  # type: ignore[type-arg]
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        """Plain text without credentials."""
        self._credentials = credentials
        self.address = address
        self.port = 0
        self.server = grpc.aio.server(
            interceptors=[AccessLogInterceptor(), ErrorInterceptor(), *interceptors],
            options=grpc_options(settings),
        )

    async def start(self) -> None:
        """Raises ConfigError where the address is taken."""
        # gRPC logs a failed bind at length and keeps the reason, so a plain socket tries first.
        self.address.check()
        try:
            self.port = self._add_port()
        except RuntimeError as error:
            raise self.address.taken() from error
        await self.server.start()

    def close_port(self) -> None:
        """Refuse new connections; those that stand may still call."""
        stop_listening(self.port)

    async def stop(self, grace: float) -> None:
        """Calls in flight get `grace` seconds to be read to their end."""
        await self.server.stop(grace)

    def _add_port(self) -> int:
        if self._credentials is None:
            return self.server.add_insecure_port(self.address.target)
        return self.server.add_secure_port(self.address.target, self._credentials)
