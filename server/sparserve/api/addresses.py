"""Where to listen: which addresses are private, and whether they are free."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from sparserve.errors import ConfigError


@dataclass(frozen=True)
class Address:
    """A host and port to listen on; port 0 is a free one."""

    host: str
    port: int
    what: str  # listens there, for messages
    flag: str  # sets the port

    def check(self) -> None:
        """Raises ConfigError where nothing can listen there."""
        try:
            socket.create_server((self.host, self.port), family=address_family(self.host)).close()
        except OSError as error:
            raise self.taken(error.strerror) from error

    def taken(self, reason: str | None = None) -> ConfigError:
        reason = reason or "in use, or not an address of this machine"
        return ConfigError(
            f"cannot listen on {self.host}:{self.port} for {self.what}: {reason}; "
            f"choose another {self.flag} or host"
        )

    @property
    def target(self) -> str:
        """As gRPC writes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def check_addresses(addresses: Sequence[Address]) -> None:
    """Raises ConfigError where a server could not listen on all of them."""
    flags: dict[int, str] = {}
    for address in addresses:
        address.check()
        if address.port and (other := flags.get(address.port)):
            raise ConfigError(f"{other} and {address.flag} are both {address.port}; choose two")
        flags[address.port] = address.flag


def stop_listening(port: int) -> None:
    """Refuse new connections to a port of this process, and leave those that stand alone.

    gRPC has no such call: with the port it closes every connection, and calls that arrive meanwhile end with CANCELLED.
    It notices the shut socket and writes a line about a failed accept.
    """
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # closed meanwhile, or no socket
            candidate = socket.socket(fileno=descriptor)
            try:
                if _listens(candidate, port):
                    candidate.shutdown(socket.SHUT_RDWR)
            finally:
                candidate.detach()


def _listens(candidate: socket.socket, port: int) -> bool:
    return (
        candidate.family in (socket.AF_INET, socket.AF_INET6)
        and candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0
        and candidate.getsockname()[1] == port
    )


def is_loopback(host: str) -> bool:
    """Only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address_family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
