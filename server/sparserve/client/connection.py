"""Where a server is, how its connection is secured, and the key that goes with every call."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TypedDict

import grpc

from sparserve.client.values import wrong
from sparserve.errors import InvalidRequest

Pem = str | PathLike[str] | bytes  # the name of a file in PEM, or its content

_SECURE, _PLAIN = "grpcs://", "grpc://"
_KEY = re.compile(r"[\x21-\x7e]+")
# "dns:///host:port" and "dns://authority/host:port"; "ipv4:address:port"
_RESOLVER = re.compile(r"(dns:(//[^/]*/)?|ipv4:|ipv6:)")


class Security(TypedDict, total=False):
    """Keywords of the clients."""

    api_key: str | None
    tls_ca: Pem | None
    tls_cert: Pem | None
    tls_key: Pem | None


@dataclass(frozen=True, slots=True)
class Connection:
    """`target` as gRPC takes it; without credentials in plain text."""

    target: str
    credentials: grpc.ChannelCredentials | None
    authorization: str | None = field(default=None, repr=False)


def connection(
    target: str,
    credentials: grpc.ChannelCredentials | None = None,
    *,
    api_key: str | None = None,
    tls_ca: Pem | None = None,
    tls_cert: Pem | None = None,
    tls_key: Pem | None = None,
) -> Connection:
    """What the arguments of the clients mean together. Raises InvalidRequest where they mean nothing."""
    plain = target.startswith(_PLAIN)
    bare = target.removeprefix(_PLAIN).removeprefix(_SECURE)
    if bare != target:
        bare = bare.removesuffix("/")
    files = {"tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key}
    given = [name for name, value in files.items() if value is not None]
    if credentials is not None and given:
        raise InvalidRequest(given[0], f"{given[0]} is given beside credentials; give one of them")
    if plain and (given or credentials is not None):
        name = given[0] if given else "credentials"
        raise InvalidRequest(
            name, f"{name} is given for {target}, which is plain text; use {_SECURE}"
        )
    if (tls_cert is None) != (tls_key is None):
        raise InvalidRequest(given[-1], "tls_cert and tls_key are given together or not at all")
    if credentials is None and (given or target.startswith(_SECURE)):
        root, key, chain = (_pem(name, files[name]) for name in ("tls_ca", "tls_key", "tls_cert"))
        credentials = grpc.ssl_channel_credentials(root, key, chain)
    if api_key is None:
        return Connection(bare, credentials)
    if not isinstance(api_key, str) or not _KEY.fullmatch(api_key):
        raise InvalidRequest("api_key", "api_key must be printable ASCII without spaces")
    if credentials is None and not plain and not _is_local(bare):
        raise InvalidRequest(
            "api_key",
            f"api_key would travel to {bare} in plain text; use {_SECURE}{bare}, or in a private network {_PLAIN}{bare}",
        )
    return Connection(bare, credentials, f"Bearer {api_key}")


def _pem(name: str, value: Pem | None) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str | PathLike):
        raise wrong(name, name, value, "the name of a PEM file, or its content as bytes")
    try:
        return Path(value).expanduser().read_bytes()
    except OSError as error:
        raise InvalidRequest(name, f"{name} {value} cannot be read: {error.strerror}") from error


def _is_local(target: str) -> bool:
    """Only this machine sees what is sent there."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    address = _RESOLVER.sub("", target, count=1)
    host = address.rpartition(":")[0] if re.search(r":\d+$", address) else address
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
