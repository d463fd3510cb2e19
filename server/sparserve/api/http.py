"""/metrics, /healthz and /readyz over HTTP, on a thread of their own so that they answer under load."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from sparserve.api.addresses import Address, address_family

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 16  # each holds a thread; a scraper and the probes need three
_POLL_SECONDS = 0.05  # `stop` waits for so long at most
_GIVE_WAY_SECONDS = 1.0


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a connection, of which there are MAX_CONNECTIONS: then the oldest gives way.

    Were the new one refused instead, a few idle connections would fail the liveness probe.
    """

    daemon_threads = True
    # Two servers on one port would answer in turn; a port in use must be an error.
    allow_reuse_port = False

    def __init__(self, *arguments: Any) -> None:
        self._connections: list[socket.socket] = []  # oldest first
        self._ended = threading.Condition()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._ended:
            if not self._has_room():
                with suppress(OSError):  # it closed meanwhile
                    self._connections[0].shutdown(socket.SHUT_RDWR)
            if not self._ended.wait_for(self._has_room, _GIVE_WAY_SECONDS):
                raise TimeoutError(f"all {MAX_CONNECTIONS} connections are busy")
            self._connections.append(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._ended:
            if request in self._connections:
                self._connections.remove(request)
            self._ended.notify()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("HTTP connection from %s failed", client_address, exc_info=True)

    def _has_room(self) -> bool:
        return len(self._connections) < MAX_CONNECTIONS


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    timeout = 10  # seconds; an idle client must not hold a thread

    def log_message(self, format: str, *args: Any) -> None:
        pass


class HttpServer:
    """`is_alive` answers /healthz (the process works), `is_ready` /readyz (requests are welcome)."""

    def __init__(
        self,
        address: Address,
        registry: CollectorRegistry,
        is_alive: Callable[[], bool],
        is_ready: Callable[[], bool],
    ) -> None:
        """Listens at once. Raises ConfigError where the port is taken."""
        metrics_app: Any = make_wsgi_app(registry)
        checks = {"/healthz": is_alive, "/readyz": is_ready}

        def app(environ: dict[str, Any], start_response: Any) -> Any:
            path = environ.get("PATH_INFO", "/")
            if path == "/metrics":
                return metrics_app(environ, start_response)
            if path not in checks:
                status, body = "404 Not Found", b"try /metrics, /healthz or /readyz\n"
            elif checks[path]():
                status, body = "200 OK", b"ok\n"
            else:
                status, body = "503 Service Unavailable", b"not ready\n"
            start_response(
                status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))]
            )
            return [body]

        try:
            v6 = address_family(address.host) is socket.AF_INET6
            kind = _ServerV6 if v6 else _Server
            self._server = make_server(address.host, address.port, app, kind, _QuietHandler)
        except OSError as error:
            raise address.taken(error.strerror) from error
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="http", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
