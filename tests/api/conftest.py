"""Connections to a real server, a hand on its backend, and what statuses say beyond their code."""

import asyncio
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2_grpc

from sparserve.api.server import Server
from sparserve.client import AsyncClient
from sparserve.v1 import control_pb2_grpc, inference_pb2_grpc

PATIENCE = 60.0  # seconds; only a broken server takes so long


@dataclass(frozen=True)
class Wire:
    """The generated stubs over one channel, for what the public client does not show."""

    channel: Any
    inference: Any
    control: Any
    health: Any


@pytest.fixture
async def server(serving) -> AsyncIterator[Server]:
    async with serving() as running:
        yield running


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"127.0.0.1:{server.port}") as connected:
        yield connected


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Wire]]:
    """`connect(server, *channel options)`: closed when the test ends."""
    channels = []

    def open_channel(server: Server, *options: tuple[str, int]) -> Wire:
        # A channel of its own: gRPC would share one connection among all with the same options.
        own = ("grpc.use_local_subchannel_pool", 1)
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=[own, *options])
        channels.append(channel)
        return Wire(
            channel,
            inference_pb2_grpc.InferenceServiceStub(channel),
            control_pb2_grpc.ControlServiceStub(channel),
            health_pb2_grpc.HealthStub(channel),
        )

    yield open_channel
    for channel in channels:
        await channel.close()


@pytest.fixture
async def wire(server: Server, connect) -> Wire:
    return connect(server)


class Forward:
    """The backend's forward under the test's control; untouched, it only counts."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.calls = 0  # begun, held ones too
        self.seconds = 0.0  # slept in each call
        self._forward = forward
        self._error: Exception | None = None
        self._failures_left = 0
        self._permits: int | None = None  # calls that may pass; None: all
        self._changed = threading.Condition()

    def hold(self) -> None:
        """Let no call through any more."""
        self._permit(0)

    def allow_one(self) -> None:
        """Let one held call through."""
        self._permit(1)

    def release(self) -> None:
        """Let all through."""
        self._permit(None)

    def fail(self, error: Exception, times: int = 1 << 30) -> None:
        """Raise `error` in the next calls."""
        self._error, self._failures_left = error, times

    def __call__(self, batch: object) -> object:
        self.calls += 1
        with self._changed:
            assert self._changed.wait_for(lambda: self._permits != 0, PATIENCE)
            if self._permits is not None:
                self._permits -= 1
        time.sleep(self.seconds)
        if self._error is not None and self._failures_left > 0:
            self._failures_left -= 1
            raise self._error
        return self._forward(batch)

    def _permit(self, calls: int | None) -> None:
        with self._changed:
            self._permits = calls
            self._changed.notify_all()


@pytest.fixture
def controlled() -> Callable[[Server], Any]:
    """`with controlled(server) as forward`: a `Forward` in the place of the backend's own."""

    @contextmanager
    def control(server: Server) -> Iterator[Forward]:
        backend: Any = server.engine.engine.backend
        forward = Forward(backend.forward)
        backend.forward = forward
        try:
            yield forward
        finally:
            forward.seconds = 0.0
            forward.release()
            del backend.forward  # the class's own again

    return control


@pytest.fixture
def http_get() -> Callable[..., Awaitable[tuple[int, str]]]:
    """`await http_get(server, "/metrics")` -> (status, body)."""

    def get(url: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return lambda server, path: asyncio.to_thread(
        get, f"http://127.0.0.1:{server.metrics_port}{path}"
    )


@pytest.fixture
def until() -> Callable[..., Awaitable[None]]:
    """`await until(condition)`: for what changes in the server and sends no event."""

    async def poll(condition: Callable[[], bool], what: str = "the condition") -> None:
        give_up = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < give_up, f"{what} did not come true in {PATIENCE:g} s"
            await asyncio.sleep(0.002)

    return poll


_DETAILS = (
    error_details_pb2.BadRequest,
    error_details_pb2.ErrorInfo,
    error_details_pb2.RetryInfo,
    error_details_pb2.QuotaFailure,
    error_details_pb2.ResourceInfo,
)


@pytest.fixture
def details_of() -> Callable[[grpc.aio.AioRpcError], dict[str, Any]]:
    """The google.rpc details of a failed call, by message name; they repeat its code and text."""

    def decode(error: grpc.aio.AioRpcError) -> dict[str, Message]:
        trailing = error.trailing_metadata()
        assert trailing is not None
        status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
        assert (status.code, status.message) == (error.code().value[0], error.details())
        found = {}
        for detail in status.details:
            kind = next(k for k in _DETAILS if detail.Is(k.DESCRIPTOR))
            found[kind.DESCRIPTOR.name] = kind.FromString(detail.value)
        return found

    return decode
