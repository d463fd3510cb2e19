"""What goes with a call beside its message, and the channel that it goes over."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from sparserve.client.connection import Connection
from sparserve.client.values import wrong
from sparserve.errors import InvalidRequest

# Names (lower case) to values; bytes only under names that end with -bin.
Metadata = Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]]
ChannelOptions = Mapping[str, Any] | Sequence[tuple[str, Any]]

_OPTIONS: dict[str, Any] = {
    "grpc.max_receive_message_length": 64 << 20,
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
}
_NAME = re.compile(r"[0-9a-z_.-]+")
_VALUE = re.compile(r"[\x20-\x7e]*")


def open_channel(library: Any, to: Connection, options: ChannelOptions) -> Any:
    """A channel of `library`, which is grpc or grpc.aio."""
    merged = list({**_OPTIONS, **dict(options)}.items())
    if to.credentials is None:
        return library.insecure_channel(to.target, options=merged)
    return library.secure_channel(to.target, to.credentials, options=merged)


def call_options(
    timeout: float | None, metadata: Metadata | None, authorization: str | None = None
) -> dict[str, Any]:
    """Keywords of a stub's method; an `authorization` in the metadata goes before the one given here.

    Raises InvalidRequest.
    """
    if timeout is not None:
        number = isinstance(timeout, Real) and not isinstance(timeout, bool)
        if not number or not (timeout > 0 and math.isfinite(timeout)):
            raise wrong("timeout", "timeout", timeout, "seconds above 0, or None to wait")
    pairs: Iterable[tuple[str, str | bytes]] = ()
    if isinstance(metadata, Mapping):
        pairs = metadata.items()
    elif metadata is not None:
        pairs = metadata
    checked = [_checked_pair(pair) for pair in pairs]
    if authorization is not None and "authorization" not in dict(checked):
        checked.append(("authorization", authorization))
    return {"timeout": timeout, "metadata": tuple(checked)}


def _checked_pair(pair: Any) -> tuple[str, str | bytes]:
    match pair:
        case (str() as name, bytes() as value) if _NAME.fullmatch(name) and name.endswith("-bin"):
            return name, value
        case (str() as name, str() as value) if _NAME.fullmatch(name) and _VALUE.fullmatch(value):
            return name, value
    raise InvalidRequest(
        "metadata",
        f"metadata has {pair!r}; it must be lower-case names and printable ASCII values, or bytes "
        "under a name that ends with -bin",
    )
