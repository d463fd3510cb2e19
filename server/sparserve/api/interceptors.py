"""What happens around every call: its line in the log, its status."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc
from opentelemetry.trace import SpanContext, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from sparserve.api.status import status_of, trailing_metadata
from sparserve.engine.async_engine import DEADLINE_SLACK_SECONDS
from sparserve.errors import RequestError
from sparserve.logs import CallRecord, current_call, set_current_call

log = logging.getLogger("sparserve.access")

# Asked every few seconds by probes and tools.
_QUIET = (
    "/grpc.health.",
    "/grpc.reflection.",
    "/vllm.grpc.engine.VllmEngine/HealthCheck",
    "/vllm.grpc.engine.VllmEngine/GetLoads",
)

Wrap = Callable[[Any], Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic only in its stubs
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]


class AccessLogInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Writes a line at the end of every call; goes first, so that it sees the status of each."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        method: str = handler_call_details.method

        def log_unary(behavior: Any) -> Any:
            async def logged(request: Any, context: Any) -> Any:
                with _logged(method, context):
                    return await behavior(request, context)

            return logged

        def log_stream(behavior: Any) -> Any:
            async def logged(request: Any, context: Any) -> AsyncIterator[Any]:
                with _logged(method, context):
                    async for response in behavior(request, context):
                        yield response

            return logged

        return wrapped(await continuation(handler_call_details), log_unary, log_stream)


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Ends a call that raised with the status of its exception; see `sparserve.api.status`."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(handler_call_details)
        return wrapped(handler, _guard_unary, _guard_stream)


def wrapped(handler: Handler, wrap_unary: Wrap, wrap_stream: Wrap) -> Handler:
    """The handler with its behavior wrapped by one of the two; None, an unknown method, stays None."""
    if handler is None:
        return handler
    # "unary_stream", say: the behavior's attribute, and how the function that makes a handler begins
    kind = "_".join(
        "stream" if streaming else "unary"
        for streaming in (handler.request_streaming, handler.response_streaming)
    )
    wrap = wrap_stream if handler.response_streaming else wrap_unary
    make: Callable[..., Handler] = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(
        wrap(getattr(handler, kind)),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


@contextmanager
def _logged(method: str, context: Any) -> Iterator[None]:
    call = CallRecord(caller_span(context.invocation_metadata() or ()))
    set_current_call(call)
    peer, began = context.peer(), time.monotonic()
    code = grpc.StatusCode.UNKNOWN
    try:
        yield
        code = context.code() or grpc.StatusCode.OK
    # A stream that is cancelled while it writes is not told but closed.
    except (asyncio.CancelledError, GeneratorExit):
        left = context.time_remaining()
        late = left is not None and left <= DEADLINE_SLACK_SECONDS
        code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
        raise
    except Exception:  # aborted; not always an AbortError where the client was gone already
        code = context.code() or code
        raise
    finally:
        set_current_call(call)  # a stream may be closed from another task
        fields = {
            "method": method,
            "code": code.name,
            "duration_ms": round((time.monotonic() - began) * 1000, 1),
            "peer": peer,
            **call.summary(),
        }
        level = logging.DEBUG if method.startswith(_QUIET) else logging.INFO
        log.log(level, "call ended", extra=fields)


def caller_span(metadata: Any) -> SpanContext:
    """The span of W3C Trace Context (`traceparent`, `tracestate`) in a call's metadata.

    Not valid where there is none, or one that is not well-formed, or more than one.
    """
    carrier: dict[str, list[str]] = {}
    for key, value in metadata:
        if key in ("traceparent", "tracestate") and isinstance(value, str):
            carrier.setdefault(key, []).append(value)
    if len(carrier.get("traceparent", ())) > 1:
        carrier = {}
    extracted = TraceContextTextMapPropagator().extract(carrier)
    return get_current_span(extracted).get_span_context()


def _guard_unary(behavior: Any) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            return await behavior(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, error)

    return guarded


def _guard_stream(behavior: Any) -> Any:
    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for response in behavior(request, context):
                yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, error)

    return guarded


async def _abort(context: Any, error: Exception) -> None:
    if isinstance(error, RequestError):
        current_call().blamed_field = error.field
    code, message, details = status_of(error)
    await context.abort(code, message, trailing_metadata(code, message, details))
