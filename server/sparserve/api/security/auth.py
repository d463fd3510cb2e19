"""Who calls, and whether the call is theirs to make."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import grpc

from sparserve.api.interceptors import Continuation, Handler, wrapped
from sparserve.api.security.keys import KeyEntry, KeyRing
from sparserve.api.security.limits import Limits, Quota
from sparserve.api.security.reloading import ReloadedFiles
from sparserve.engine.request import GenerationRequest
from sparserve.errors import KeyLimitReached, PermissionDenied, Unauthenticated
from sparserve.logs import current_call
from sparserve.metrics import Metrics

_INFERENCE = "/sparserve.v1.InferenceService/"
_CONTROL = "/sparserve.v1.ControlService/"


class Access(Enum):
    OPEN = "nobody is asked for a key"
    KEY = "any key"
    LIMITED = "any key, within its limits"
    CONTROL = "a key with control"


# Abort is for any key: without control it finds the caller's own requests alone.
ACCESS: Mapping[str, Access] = {
    "/grpc.health.v1.Health/Check": Access.OPEN,
    "/grpc.health.v1.Health/List": Access.OPEN,
    "/grpc.health.v1.Health/Watch": Access.OPEN,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": Access.KEY,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Access.KEY,
    **dict.fromkeys(
        [
            _INFERENCE + name
            for name in (
                "Chat", "ChatStream", "Detokenize", "Embed", "Generate", "GenerateStream", "Tokenize",
            )
        ],
        Access.LIMITED,
    ),
    **dict.fromkeys(
        [
            _CONTROL + name
            for name in (
                "Abort", "GetLoad", "GetModelInfo", "GetServerInfo", "GetTokenizer", "ListModels",
            )
        ],
        Access.KEY,
    ),
    **dict.fromkeys(
        [_CONTROL + name for name in ("Drain", "LoadAdapter", "UnloadAdapter")], Access.CONTROL
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever makes the call that this code runs in, the `Meter` of their requests.

    Without keys nobody has a name and all may do all.
    """

    name: str = ""
    control: bool = True
    own_cache: bool = False  # prompts of others are not found in the prefix cache
    quota: Quota | None = None
    entry: KeyEntry | None = None  # of the key that was shown
    count_tokens: Callable[[float], None] = lambda tokens: None

    def claim(self, request: GenerationRequest) -> GenerationRequest:
        """The request as this caller's own."""
        salt = request.cache_salt
        if self.own_cache:
            salt = hashlib.sha256(f"{self.name}\0{salt}".encode()).hexdigest()
        return replace(request, owner=self.name, cache_salt=salt)

    def check_tokens(self, tokens: int = 1) -> None:
        """Raises KeyLimitReached where a prompt of so many tokens may not begin now."""
        if self.quota is not None:
            self.quota.check_tokens(tokens)

    def admit(self, prompt_tokens: int) -> None:
        self.check_tokens(prompt_tokens)
        self.charge(prompt_tokens)

    def charge(self, tokens: int) -> None:
        if self.quota is not None:
            self.quota.charge(tokens)
        self.count_tokens(tokens)


_ANYBODY = Caller()
_caller: ContextVar[Caller] = ContextVar("caller", default=_ANYBODY)


def current_caller() -> Caller:
    return _caller.get()


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Asks every call for a key in the metadata `authorization: Bearer …`; goes after the one for errors."""

    def __init__(
        self,
        files: ReloadedFiles[KeyRing],
        defaults: Limits,
        metrics: Metrics,
        *,
        open_reflection: bool = False,
        share_prefix_cache: bool = False,
    ) -> None:
        self._files = files
        self._defaults = defaults
        self._metrics = metrics
        self._open_reflection = open_reflection
        self._own_cache = not share_prefix_cache
        self._quotas: dict[str, Quota] = {}
        self.reloaded()

    def reloaded(self) -> None:
        """Take over the limits of the keys that there are now; what was used of them stays used."""
        entries = self._files.value.entries
        for name, entry in entries.items():
            limits = self._limits(entry)
            if name in self._quotas:
                self._quotas[name].change(limits)
            else:
                self._quotas[name] = Quota(name, limits)
        for name in [name for name in self._quotas if name not in entries]:
            del self._quotas[name]
        self._metrics.set_keys(entries)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        access = self._access(handler_call_details.method)
        if access is Access.OPEN:
            return await continuation(handler_call_details)
        try:
            caller = self._authenticate(handler_call_details.invocation_metadata)
        except Unauthenticated as error:
            self._metrics.auth_refusals.labels(reason="key").inc()
            return _refusal(error)
        handler = await continuation(handler_call_details)
        if handler is not None and access is Access.CONTROL and not caller.control:
            self._metrics.auth_refusals.labels(reason="permission").inc()
            handler = _refusal(PermissionDenied(caller.name, handler_call_details.method))
        return self._run_as(caller, access is Access.LIMITED, handler)

    def _access(self, method: str) -> Access:
        """What no table has is for control alone, until somebody decides."""
        if self._open_reflection and method.startswith("/grpc.reflection."):
            return Access.OPEN
        return ACCESS.get(method, Access.CONTROL)

    def _authenticate(self, metadata: Any) -> Caller:
        """Raises Unauthenticated, which never tells why."""
        shown = [value for name, value in metadata or () if name == "authorization"]
        if len(shown) != 1 or not isinstance(shown[0], str):
            raise Unauthenticated
        scheme, _, key = shown[0].partition(" ")
        entry = self._files.value.find(key.strip())
        if scheme.lower() != "bearer" or entry is None:
            raise Unauthenticated
        quota = self._quotas.get(entry.name)
        if quota is None:  # the file was read a moment ago
            quota = self._quotas[entry.name] = Quota(entry.name, self._limits(entry))
        count_tokens = self._metrics.api_key_tokens.labels(key=entry.name).inc
        return Caller(entry.name, entry.control, self._own_cache, quota, entry, count_tokens)

    def _limits(self, entry: KeyEntry) -> Limits:
        """The key's own, and the server's where it says nothing."""
        own = {
            name: value
            for name in Limits.__dataclass_fields__
            if (value := getattr(entry, name)) is not None
        }
        return replace(self._defaults, **own)

    def _run_as(self, caller: Caller, limited: bool, handler: Handler) -> Handler:
        def unary(behavior: Any) -> Any:
            async def run(request: Any, context: Any) -> Any:
                with self._called(caller, limited):
                    return await behavior(request, context)

            return run

        def stream(behavior: Any) -> Any:
            async def run(request: Any, context: Any) -> AsyncIterator[Any]:
                with self._called(caller, limited):
                    async for response in behavior(request, context):
                        yield response

            return run

        return wrapped(handler, unary, stream)

    def _check_still_valid(self, caller: Caller) -> None:
        """A call may send its message long after its key was looked at. Raises Unauthenticated."""
        now = self._files.value.entries.get(caller.name)
        if caller.entry is not None and (now is None or now.sha256 != caller.entry.sha256):
            self._metrics.auth_refusals.labels(reason="key").inc()
            raise Unauthenticated

    @contextmanager
    def _called(self, caller: Caller, limited: bool) -> Iterator[None]:
        self._check_still_valid(caller)
        _caller.set(caller)
        current_call().key = caller.name
        self._metrics.api_key_calls.labels(key=caller.name).inc()
        quota = caller.quota if limited else None
        try:
            if quota is not None:
                quota.begin()
            try:
                yield
            finally:
                if quota is not None:
                    quota.end()
        except KeyLimitReached:
            self._metrics.api_key_limited.labels(key=caller.name).inc()
            raise


def _refusal(error: Exception) -> Handler:
    """Ends a call of any kind with `error`, before its message is read."""

    async def refuse(requests: Any, context: Any) -> AsyncIterator[Any]:
        raise error
        yield  # a stream of nothing

    return grpc.stream_stream_rpc_method_handler(refuse)
