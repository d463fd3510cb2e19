"""grpc.health.v1 for the server as a whole ("") and for each service; all turn together.

grpcio-health-checking's own servicer stops telling every watcher of a service once one of them has
left, and its watchers hold up a graceful stop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from sparserve.api.status import shortened


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """NOT_SERVING until told otherwise; use it on one event loop."""

    def __init__(self, services: Sequence[str]) -> None:
        self._names = frozenset(("", *services))
        self._status = pb.HealthCheckResponse.NOT_SERVING
        self._closed = False
        self._changed = asyncio.Event()

    def add(self, services: Sequence[str]) -> None:
        self._names |= {*services}

    def set(self, status: pb.HealthCheckResponse.ServingStatus) -> None:
        self._status = status
        self._wake()

    def close(self) -> None:
        """End every Watch, once it has told the last status."""
        self._closed = True
        self._wake()

    async def Check(self, request: pb.HealthCheckRequest, context: Any) -> pb.HealthCheckResponse:
        if request.service not in self._names:
            message = f"service {shortened(request.service)!r} is not served here"
            await context.abort(grpc.StatusCode.NOT_FOUND, message)
        return pb.HealthCheckResponse(status=self._status)

    async def Watch(
        self, request: pb.HealthCheckRequest, context: Any
    ) -> AsyncIterator[pb.HealthCheckResponse]:
        known, told = request.service in self._names, None
        while True:
            changed = self._changed
            status = self._status if known else pb.HealthCheckResponse.SERVICE_UNKNOWN
            if status != told:
                yield pb.HealthCheckResponse(status=status)
                told = status
            elif self._closed:
                return
            else:
                await changed.wait()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
