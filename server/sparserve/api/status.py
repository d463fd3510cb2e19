"""Exceptions to gRPC statuses with details that clients and balancers act on.

Codes are chosen so that gateways retry the right ones: RESOURCE_EXHAUSTED and UNAVAILABLE elsewhere,
never INVALID_ARGUMENT or INTERNAL. CANCELLED is the client's word, so the server never sends it.
"""

from __future__ import annotations

import logging
import uuid

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2

from sparserve import errors

log = logging.getLogger(__name__)

DOMAIN = "sparserve"
_MAX_TEXT = 500  # characters; the message travels several times
STATUS_KEY = "grpc-status-details-bin"


def status_of(error: Exception) -> tuple[grpc.StatusCode, str, list[Message]]:
    """-> (code, message, details). An unexpected exception becomes INTERNAL with an id and a log line."""
    message = shortened(str(error))
    match error:
        case errors.PromptTooLong():
            info = _info("PROMPT_TOO_LONG", field=error.field, max_prompt_tokens=str(error.limit))
            return grpc.StatusCode.INVALID_ARGUMENT, message, [_violation(error), info]
        case errors.NotBuiltYet():
            info = _info("NOT_BUILT_YET", field=error.field)
            return grpc.StatusCode.UNIMPLEMENTED, message, [info]
        case errors.UnknownModel():
            resource = details.ResourceInfo(
                resource_type="model", resource_name=shortened(error.model), description=message
            )
            return grpc.StatusCode.NOT_FOUND, message, [resource]
        case errors.DuplicateRequest():
            return grpc.StatusCode.ALREADY_EXISTS, message, [_violation(error)]
        case errors.ChatUnavailable():
            info = _info("CHAT_UNAVAILABLE", field=error.field)
            return grpc.StatusCode.FAILED_PRECONDITION, message, [info]
        case errors.SparsityUnavailable():
            info = _info("SPARSITY_UNAVAILABLE", field=error.field)
            return grpc.StatusCode.FAILED_PRECONDITION, message, [info]
        case errors.RequestError():
            return grpc.StatusCode.INVALID_ARGUMENT, message, [_violation(error)]
        case errors.Unauthenticated():
            return grpc.StatusCode.UNAUTHENTICATED, message, [_info("KEY_NEEDED")]
        case errors.PermissionDenied():
            info = _info("PERMISSION_DENIED", method=error.method)
            return grpc.StatusCode.PERMISSION_DENIED, message, [info]
        case errors.KeyLimitReached():
            quota = details.QuotaFailure.Violation(
                subject=f"key:{error.key}",
                description=message,
                quota_metric=error.limit,
                quota_value=error.value,
            )
            return (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                message,
                [_retry(error.retry_after), details.QuotaFailure(violations=[quota])],
            )
        case errors.QueueFull():
            quota = details.QuotaFailure.Violation(subject=error.what, description=message)
            retry = _retry(error.retry_after)
            return (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                message,
                [retry, details.QuotaFailure(violations=[quota])],
            )
        case errors.SlowReader():
            return grpc.StatusCode.RESOURCE_EXHAUSTED, message, [_info("SLOW_READER")]
        case errors.FellBehind():
            return grpc.StatusCode.DATA_LOSS, message, [_info("FELL_BEHIND")]
        case errors.Unavailable():
            retry_after = error.retry_after
            return (
                grpc.StatusCode.UNAVAILABLE,
                message,
                [] if retry_after is None else [_retry(retry_after)],
            )
        case errors.DeadlineExceeded():
            return grpc.StatusCode.DEADLINE_EXCEEDED, message, []
        case errors.EngineFailure():
            return (
                grpc.StatusCode.INTERNAL,
                message,
                [_info("ENGINE_FAILURE", error_id=error.error_id)],
            )
    error_id = uuid.uuid4().hex[:12]
    log.error("unexpected error in a call, error id %s", error_id, exc_info=error)
    return (
        grpc.StatusCode.INTERNAL,
        f"unexpected error; error id {error_id} in the server's log",
        [_info("UNEXPECTED", error_id=error_id)],
    )


def trailing_metadata(
    code: grpc.StatusCode, message: str, extra: list[Message]
) -> tuple[tuple[str, bytes], ...]:
    """google.rpc.Status as the trailing metadata where rich clients look for it."""
    number: int = code.value[0]
    status = status_pb2.Status(code=number, message=message)
    for detail in extra:
        status.details.add().Pack(detail)
    return ((STATUS_KEY, status.SerializeToString()),)


def shortened(text: str) -> str:
    """Trailers over 8 KiB fail the call with another status, so what a caller sent is not echoed whole."""
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"


def _violation(error: errors.RequestError) -> details.BadRequest:
    violation = details.BadRequest.FieldViolation(
        field=error.field, description=shortened(str(error))
    )
    return details.BadRequest(field_violations=[violation])


def _info(reason: str, **metadata: str) -> details.ErrorInfo:
    return details.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)


def _retry(seconds: float) -> details.RetryInfo:
    delay = Duration()
    delay.FromMilliseconds(int(seconds * 1000))
    return details.RetryInfo(retry_delay=delay)
