"""/metrics, /healthz and /readyz over HTTP, on a thread of their own so that they answer under load."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from sparserve.errors import ConfigError
from sparserve.metrics import Metrics

_POLL_SECONDS = 0.05  # `stop` waits for so long at most


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    # Two servers on one port would answer in turn; a port in use must be an error.
    allow_reuse_port = False


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    timeout = 10  # seconds; an idle client must not hold a thread

    def log_message(self, format: str, *args: Any) -> None:
        pass


def address_family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class HttpServer:
    """`is_alive` answers /healthz (the process works), `is_ready` /readyz (requests are welcome)."""

    def __init__(
        self,
        host: str,
        port: int,
        metrics: Metrics,
        is_alive: Callable[[], bool],
        is_ready: Callable[[], bool],
    ) -> None:
        """Listens at once. Raises ConfigError where the port is taken."""
        metrics_app: Any = make_wsgi_app(metrics.registry)
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
            kind = _ServerV6 if address_family(host) is socket.AF_INET6 else _Server
            self._server = make_server(host, port, app, kind, _QuietHandler)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} for metrics: {error.strerror}; choose another --metrics-port"
            ) from error
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="http", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
