"""The server put together: engine, services, health, reflection, HTTP, start and orderly end."""

from __future__ import annotations

import asyncio
import logging
import signal

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from sparserve.api.adapters.registry import adapter
from sparserve.api.addresses import Address, is_loopback
from sparserve.api.control import ControlService
from sparserve.api.health import HealthService
from sparserve.api.http import HttpServer
from sparserve.api.inference import InferenceService
from sparserve.api.listener import Listener
from sparserve.api.reflection import add_reflection
from sparserve.api.security.guard import Guard
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
# On a busy event loop connections that were made before the ports closed get so long for their call, and calls that
# came before GOAWAY to become requests in flight. gRPC ends with CANCELLED what it has not handed over until then.
_LAST_ARRIVALS_SECONDS = 0.5


class Server:
    """A server on the running event loop: `start`, then `drain_and_stop` once."""

    def __init__(self, engine: Engine, model_name: str, settings: ServerSettings) -> None:
        self._settings = settings
        self._health = HealthService(SERVICES)
        self._http: HttpServer | None = None
        self._welcoming = False  # warm, and not about to end
        self._asked_to_end = asyncio.Event()
        self.engine = AsyncEngine(
            engine,
            max_waiting=settings.max_waiting,
            max_waiting_tokens=settings.max_waiting_tokens,
            max_stream_backlog=settings.max_stream_backlog,
            on_state=self._on_state,
        )
        self._guard = Guard(settings, engine.metrics)
        self._listener = self._own_listener(model_name)
        self._adapters = self._adapter_listener(model_name) if settings.adapter_names else None
        self.ended = True  # False once a stop left the engine thread behind
        self.metrics_port = 0

    @property
    def port(self) -> int:
        """Of our own services; 0 before `start`."""
        return self._listener.port

    @property
    def adapters_port(self) -> int:
        """Of the adapters; 0 before `start`, and without any."""
        return self._adapters.port if self._adapters else 0

    @property
    def is_ready(self) -> bool:
        return self._welcoming and self.engine.state is EngineState.READY

    @property
    def lost_device(self) -> bool:
        """The GPU failed; another process may be able to use it."""
        return isinstance(self.engine.engine.broken, DeviceFailure)

    async def start(self) -> None:
        """Warm up, listen, then turn SERVING. Raises ConfigError where a port is taken."""
        settings, engine_metrics = self._settings, self.engine.engine.metrics
        try:
            self._http = HttpServer(
                metrics_address(settings),
                engine_metrics.exposition(vllm=settings.metrics_compat == "vllm"),
                is_alive=lambda: self.engine.state is not EngineState.BROKEN,
                is_ready=lambda: self.is_ready,
            )
            self.metrics_port = self._http.port
            await self.engine.warm_up()
            for listener in self._listeners:
                await listener.start()
            self._guard.start()
        except BaseException:
            await self._close(grace=0)
            raise
        self._welcoming = True
        if self.is_ready:
            self._health.set(health_pb2.HealthCheckResponse.SERVING)

    async def drain_and_stop(self) -> None:
        """Readiness goes first; after `drain_delay` seconds the ports close, then connections get GOAWAY;
        requests in flight get `drain_timeout` seconds, then all ends.

        So clients and balancers go elsewhere before a request is refused, also those that ask for no health.
        """
        self._welcoming = False
        self._health.set(health_pb2.HealthCheckResponse.NOT_SERVING)
        if self.engine.state is EngineState.READY:
            await asyncio.sleep(self._settings.drain_delay)
        for listener in self._listeners:
            listener.close_port()
        last_arrivals = _LAST_ARRIVALS_SECONDS if self.engine.in_flight else 0
        await asyncio.sleep(last_arrivals)
        grace = self._settings.drain_timeout + _GRACE_SECONDS
        closing = [asyncio.create_task(listener.stop(grace)) for listener in self._listeners]
        await asyncio.sleep(last_arrivals)
        await self.engine.drain(self._settings.drain_timeout)
        self._health.close()
        await self._close(_GRACE_SECONDS)
        await asyncio.gather(*closing)

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
            "draining: %g s in which new requests are taken, then up to %g s for %d requests",
            self._settings.drain_delay,
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

    def _own_listener(self, model_name: str) -> Listener:
        settings = self._settings
        listener = Listener(
            grpc_address(settings),
            settings,
            interceptors=self._guard.interceptors,
            credentials=self._guard.credentials,
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceService(self.engine, model_name), listener.server
        )
        control_pb2_grpc.add_ControlServiceServicer_to_server(
            ControlService(self.engine, model_name, settings), listener.server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, listener.server)
        add_reflection(listener.server, (*SERVICES, health.SERVICE_NAME))
        return listener

    def _adapter_listener(self, model_name: str) -> Listener:
        settings = self._settings
        listener = Listener(adapters_address(settings), settings)
        services = [
            service
            for name in settings.adapter_names
            for service in adapter(name)(
                listener.server, self.engine, model_name, settings, lambda: self.is_ready
            )
        ]
        self._health.add(services)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, listener.server)
        add_reflection(listener.server, (*services, health.SERVICE_NAME))
        return listener

    @property
    def _listeners(self) -> list[Listener]:
        return [self._listener, *([self._adapters] if self._adapters else [])]

    async def _close(self, grace: float) -> None:
        await self._guard.stop()
        await asyncio.gather(*(listener.stop(grace) for listener in self._listeners))
        self.ended = await self.engine.stop()
        if self._http is not None:
            self._http.stop()

    def _on_state(self, state: EngineState) -> None:
        log.info("engine is %s", state.value)
        if state is not EngineState.READY:
            self._health.set(health_pb2.HealthCheckResponse.NOT_SERVING)
        if self.lost_device:
            self._asked_to_end.set()


def grpc_address(settings: ServerSettings) -> Address:
    return Address(settings.host, settings.port, "gRPC", "--port")


def metrics_address(settings: ServerSettings) -> Address:
    host = settings.metrics_host or settings.host
    return Address(host, settings.metrics_port, "metrics", "--metrics-port")


def adapters_address(settings: ServerSettings) -> Address:
    return Address(settings.adapters_host, settings.adapters_port, "adapters", "--adapters-port")


def addresses(settings: ServerSettings) -> list[Address]:
    """All that a server with these settings listens on. Raises ConfigError where one may not be used."""
    found = [grpc_address(settings), metrics_address(settings)]
    if not settings.adapter_names:
        return found
    host = settings.adapters_host
    if not (is_loopback(host) or settings.allow_public_adapters):
        raise ConfigError(
            f"adapters have neither encryption nor authentication, and --adapters-host {host} can be reached by others: "
            "use 127.0.0.1, or in a private network --allow-public-adapters"
        )
    return [*found, adapters_address(settings)]
