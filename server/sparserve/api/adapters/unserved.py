"""What a protocol has and this server does not serve: UNIMPLEMENTED, in words."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from sparserve.errors import NotBuiltYet


class Unserved(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Answers every other method of `service`; add it after the service itself, which is asked first."""

    def __init__(self, service: ServiceDescriptor) -> None:
        self._name = service.full_name
        self._served = ", ".join(method.name for method in service.methods)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        service, _, method = handler_call_details.method.removeprefix("/").partition("/")
        if service != self._name:
            return None

        async def refuse(requests: Any, context: Any) -> AsyncIterator[bytes]:
            raise NotBuiltYet(
                method, f"{service}/{method} is not served here; {service} has {self._served}"
            )
            yield b""  # for Python: what yields is a stream

        return grpc.stream_stream_rpc_method_handler(refuse)
