"""Every exception that sparserve raises on purpose; knows nothing of gRPC.

    SparserveError
      ConfigError                 settings that cannot work together
        UnusableIndex             a calibrated index is damaged or was made for something else
      ModelError
        ModelNotFound             no such model, file or cached download
        CorruptCheckpoint         the files are damaged, truncated or contradict themselves
        UnsupportedModel          well-formed, but nothing here can run it
        DownloadFailed            a named model could not be fetched or failed its checksum
      RequestError                the caller's request is at fault
        InvalidRequest            a field has a value that cannot work
        PromptTooLong             the prompt does not fit the context
        NotBuiltYet               a documented field that this server does not serve yet
        UnknownModel              another model than the one served
        DuplicateRequest          the request id is in flight already
        ChatUnavailable           the model has no chat template that works
        SparsityUnavailable       the server cannot choose neurons as asked
      Unauthenticated             no key that is known came with the call
      PermissionDenied            the caller's key is not for this call
      KeyLimitReached             the caller's key has used up a limit
      QueueFull                   too many requests or prompt tokens wait
      SlowReader                  a stream was not read
      FellBehind                  changes of the prefix cache were not read
      Unavailable                 draining, stopped or broken
        DeviceFailure             the GPU failed, and the server ends
      DeadlineExceeded            the request's own deadline passed
      EngineFailure               a step failed; carries an id that the log has too
      ChildFailed                 a program that a command runs beside itself does not stay up
      CallFailed                  the client's view of a status that a server sent

Each message names the value, the limit it met and, where there is one, the way out.
"""

from __future__ import annotations

import reprlib


class SparserveError(Exception):
    """Base of all of them."""


class ConfigError(SparserveError):
    """Settings that cannot work together."""


class UnusableIndex(ConfigError):
    """A calibrated index is damaged, or was made for another model, tokenizer or format."""


class ModelError(SparserveError):
    """A model could not be loaded."""


class ModelNotFound(ModelError):
    """No such model, file or cached download."""


class CorruptCheckpoint(ModelError):
    """The files are damaged, truncated or contradict themselves."""


class UnsupportedModel(ModelError):
    """The files are well-formed, but nothing here can run them."""


class DownloadFailed(ModelError):
    """A named model could not be fetched or failed its checksum."""


class RequestError(SparserveError):
    """The caller's request is at fault; `field` is its path in the request message."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class InvalidRequest(RequestError):
    """A field has a value that cannot work."""


class PromptTooLong(RequestError):
    """The prompt does not fit the context; `limit` is the most prompt tokens accepted."""

    def __init__(self, field: str, message: str, limit: int) -> None:
        super().__init__(field, message)
        self.limit = limit


class NotBuiltYet(RequestError):
    """A documented field or value that this server does not serve yet."""


class UnknownModel(RequestError):
    """Another model than the one served; `model` is what was asked for."""

    def __init__(self, model: str, served: str) -> None:
        super().__init__(
            "model", f"model {reprlib.repr(model)} is not served here; this server has {served!r}"
        )
        self.model = model


class DuplicateRequest(RequestError):
    """The request id is in flight already."""

    def __init__(self, request_id: str) -> None:
        super().__init__(
            "request_id", f"request_id {reprlib.repr(request_id)} is in flight already; use another"
        )


class ChatUnavailable(RequestError):
    """The model has no chat template that works, so no conversation can be a prompt."""

    def __init__(self, message: str) -> None:
        super().__init__("messages", message)


class SparsityUnavailable(RequestError):
    """What the server lacks (an index, a backend) keeps it from choosing neurons as asked; `field` is
    what asked for it."""


class Unauthenticated(SparserveError):
    """No key that is known came with the call; which of the two it was is not told."""

    def __init__(self) -> None:
        super().__init__(
            "this call needs a key that the server knows, in the metadata `authorization: Bearer KEY`"
        )


class PermissionDenied(SparserveError):
    """The caller's key is not for this call; `method` is what it called."""

    def __init__(self, key: str, method: str) -> None:
        super().__init__(f"the key {key} may not call {method}; it takes one with control")
        self.method = method


class KeyLimitReached(SparserveError):
    """The caller's key has used up `limit`, a field of its entry; try again after `retry_after` seconds."""

    def __init__(self, key: str, limit: str, value: int, what: str, retry_after: float) -> None:
        super().__init__(
            f"the key {key} has used up its {value} {what} ({limit}); retry in {retry_after:g} s"
        )
        self.key = key
        self.limit = limit
        self.value = value
        self.retry_after = retry_after


class QueueFull(SparserveError):
    """Too much waits; try again after `retry_after` seconds."""

    def __init__(self, what: str, count: int, limit: int, retry_after: float) -> None:
        super().__init__(
            f"the queue is full: {count} {what}, the limit is {limit}; retry in {retry_after:g} s"
        )
        self.what = what
        self.retry_after = retry_after


class SlowReader(SparserveError):
    """The client did not read its stream, and more was generated than is kept for it."""

    def __init__(self, backlog: int, limit: int) -> None:
        super().__init__(
            f"{backlog} tokens were generated and not read, the limit is {limit}; the request was ended"
        )


class FellBehind(SparserveError):
    """A watcher of the prefix cache did not read its changes, and lost count of them."""

    def __init__(self, backlog: int, limit: int) -> None:
        super().__init__(
            f"{backlog} changes of the prefix cache were not read, the limit is {limit}; watch it anew"
        )


class Unavailable(SparserveError):
    """The server takes no requests now; `retry_after` in seconds is None where it won't again."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeviceFailure(Unavailable):
    """The GPU failed, and the server ends; `error_id` stands beside the reason in its log."""

    def __init__(self, error_id: str) -> None:
        super().__init__(
            f"the GPU failed and the server ends; error id {error_id} in the server's log"
        )
        self.error_id = error_id


class DeadlineExceeded(SparserveError):
    """The request's own deadline passed before it was done."""


class EngineFailure(SparserveError):
    """An engine step failed; `error_id` stands beside the traceback in the server's log."""

    def __init__(self, error_id: str) -> None:
        super().__init__(
            f"the engine failed on this request; error id {error_id} in the server's log"
        )
        self.error_id = error_id


class ChildFailed(SparserveError):
    """A program that a command runs beside itself does not stay up."""


class CallFailed(SparserveError):
    """A server answered with an error status.

    `code` is the gRPC status name ("RESOURCE_EXHAUSTED"), `retry_after` the seconds a server asked
    to wait (None: it did not), `violations` maps request fields to what is wrong with them.
    """

    def __init__(
        self,
        code: str,
        message: str,
        retry_after: float | None = None,
        violations: dict[str, str] | None = None,
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry_after = retry_after
        self.violations = violations or {}
