"""The server put together: engine, services, health, reflection, HTTP, start and orderly end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from sparserve.api.control import ControlService
from sparserve.api.health import HealthService
from sparserve.api.http import HttpServer, address_family
from sparserve.api.inference import InferenceService
from sparserve.api.interceptors import AccessLogInterceptor, ErrorInterceptor
from sparserve.api.reflection import add_reflection
from sparserve.config import ServerSettings
from sparserve.engine.async_engine import AsyncEngine, EngineState
from sparserve.engine.engine import Engine
from sparserve.errors import ConfigError, DeviceFailure
from sparserve.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

log = logging.getLogger(__name__)

SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name,
)
# Calls whose requests are done get so long to be read to their end.
_GRACE_SECONDS = 5.0


def grpc_options(settings: ServerSettings) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_concurrent_streams", 4096),
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
    return options


class Server:
    """A server on the running event loop: `start`, then `drain_and_stop` once."""

    def __init__(self, engine: Engine, model_name: str, settings: ServerSettings) -> None:
        self._settings = settings
        self._health = HealthService(SERVICES)
        self._http: HttpServer | None = None
        self._warm = False
        self._asked_to_end = asyncio.Event()
        self.engine = AsyncEngine(
            engine,
            max_waiting=settings.max_waiting,
            max_waiting_tokens=settings.max_waiting_tokens,
            max_stream_backlog=settings.max_stream_backlog,
            on_state=self._on_state,
        )
        self._grpc = grpc.aio.server(
            interceptors=[AccessLogInterceptor(), ErrorInterceptor()],
            options=grpc_options(settings),
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceService(self.engine, model_name), self._grpc
        )
        control_pb2_grpc.add_ControlServiceServicer_to_server(
            ControlService(self.engine, model_name, settings), self._grpc
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        add_reflection(self._grpc, (*SERVICES, health.SERVICE_NAME))
        self.port = 0
        self.ended = True  # False once a stop left the engine thread behind
        self.metrics_port = 0

    @property
    def is_ready(self) -> bool:
        return self._warm and self.engine.state is EngineState.READY

    @property
    def lost_device(self) -> bool:
        """The GPU failed; another process may be able to use it."""
        return isinstance(self.engine.engine.broken, DeviceFailure)

    async def start(self) -> None:
        """Warm up, listen, then turn SERVING. Raises ConfigError where a port is taken."""
        settings, engine_metrics = self._settings, self.engine.engine.metrics
        try:
            self._http = HttpServer(
                settings.host,
                settings.metrics_port,
                engine_metrics.exposition(vllm=settings.metrics_compat == "vllm"),
                is_alive=lambda: self.engine.state is not EngineState.BROKEN,
                is_ready=lambda: self.is_ready,
            )
            self.metrics_port = self._http.port
            await self.engine.warm_up()
            self.port = self._listen()
            await self._grpc.start()
        except BaseException:
            await self._close(grace=0)
            raise
        self._warm = True
        if self.is_ready:
            self._health.set(health_pb2.HealthCheckResponse.SERVING)

    async def drain_and_stop(self) -> None:
        """Readiness goes first, requests in flight get `drain_timeout` seconds, then all ends."""
        await self.engine.drain(self._settings.drain_timeout)
        self._health.close()
        await self._close(_GRACE_SECONDS)

    async def run_until_signalled(self) -> None:
        """Serve until SIGTERM or SIGINT or the GPU fails, then drain; a second signal ends the wait."""
        loop = asyncio.get_running_loop()
        asked, impatient = self._asked_to_end, asyncio.Event()

        def on_signal() -> None:
            (impatient if asked.is_set() else asked).set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        await asked.wait()
        log.info(
            "draining: up to %g s for %d requests",
            self._settings.drain_timeout,
            self.engine.in_flight,
        )
        stop = asyncio.create_task(self.drain_and_stop())
        hurry = asyncio.create_task(impatient.wait())
        await asyncio.wait({stop, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if stop.done():
            await stop
        else:
            log.warning("second signal: stopping without waiting")
            stop.cancel()
            await self._close(grace=0)

    def _listen(self) -> int:
        """The port of the gRPC listener. Raises ConfigError."""
        host, port = self._settings.host, self._settings.port
        # gRPC logs a failed bind at length and keeps the reason, so a plain socket tries first.
        _try_port(host, port, "gRPC", "--port")
        try:
            return self._grpc.add_insecure_port(
                f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            )
        except RuntimeError as error:
            raise _cannot_listen(host, port, "gRPC", "--port", None) from error

    async def _close(self, grace: float) -> None:
        await self._grpc.stop(grace)
        self.ended = await self.engine.stop()
        if self._http is not None:
            self._http.stop()

    def _on_state(self, state: EngineState) -> None:
        log.info("engine is %s", state.value)
        if state is not EngineState.READY:
            self._health.set(health_pb2.HealthCheckResponse.NOT_SERVING)
        if self.lost_device:
            self._asked_to_end.set()


def check_ports(settings: ServerSettings) -> None:
    """Raises ConfigError where a server with these settings could not listen."""
    _try_port(settings.host, settings.port, "gRPC", "--port")
    _try_port(settings.host, settings.metrics_port, "metrics", "--metrics-port")
    if settings.port == settings.metrics_port != 0:
        raise ConfigError(f"--port and --metrics-port are both {settings.port}; choose two")


def is_loopback(host: str) -> bool:
    """Only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _try_port(host: str, port: int, what: str, flag: str) -> None:
    try:
        socket.create_server((host, port), family=address_family(host)).close()
    except OSError as error:
        raise _cannot_listen(host, port, what, flag, error.strerror) from error


def _cannot_listen(host: str, port: int, what: str, flag: str, reason: str | None) -> ConfigError:
    reason = reason or "in use, or not an address of this machine"
    return ConfigError(
        f"cannot listen on {host}:{port} for {what}: {reason}; choose another {flag} or --host"
    )
