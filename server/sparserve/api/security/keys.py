"""Keys that callers show: random texts, of which a file holds the hashes.

Keys are 256 random bits, so one round of SHA-256 is all that the file needs: nobody can try them out, as
passwords chosen by people could be.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sparserve.api.security.reloading import ReloadedFiles
from sparserve.config.security import SecuritySettings
from sparserve.errors import ConfigError

# Every call is compared with every key, and each has series of its own in the metrics.
MAX_KEYS = 1000
PREFIX = "sps_"  # so that scanners for leaked secrets can know them
_RANDOM_BYTES = 32

PerMinute = Annotated[int, Field(ge=0, le=1_000_000_000)]


class KeyEntry(BaseModel):
    """One line of the file. Limits: None is the server's default, 0 none."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    control: bool = False
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    concurrent: Annotated[int, Field(ge=0, le=1_000_000)] | None = None


_ENTRIES = TypeAdapter(list[KeyEntry])


class KeyRing:
    """The keys of one reading of the file, by name."""

    def __init__(self, entries: Sequence[KeyEntry]) -> None:
        self.entries = {entry.name: entry for entry in entries}
        self._digests = [(bytes.fromhex(entry.sha256), entry) for entry in entries]

    def find(self, key: str) -> KeyEntry | None:
        """Takes as long whichever key it is, and where it is none."""
        shown = _digest(key)
        found = None
        for digest, entry in self._digests:
            if hmac.compare_digest(digest, shown):
                found = entry
        return found


def key_files(settings: SecuritySettings) -> ReloadedFiles[KeyRing] | None:
    """None where no key is asked for. Raises ConfigError that names file and line."""
    if not settings.api_keys:
        return None
    path = Path(settings.api_keys).expanduser()
    return ReloadedFiles(
        "the file of API keys", [path], lambda contents: parse_keys(path, contents[0])
    )


def parse_keys(path: Path, content: bytes) -> KeyRing:
    """Raises ConfigError, which never quotes the file: somebody may have put a key there instead of its hash."""
    wrong = partial(_wrong, path)
    if not content.strip():  # often one that is being written
        raise wrong("it is empty; `sparserve keys new` makes a key, and [] is no keys at all")
    try:
        lines = yaml.safe_load(content.decode())
    except UnicodeDecodeError as error:
        raise wrong("it is not UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise wrong(f"{line}it is no YAML") from None
    # Tags make PyYAML raise others, whose texts quote the file.
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise wrong("it is no YAML") from None
    try:
        entries = _ENTRIES.validate_python([] if lines is None else lines)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise wrong(f"{_place(first['loc'])}{first['msg']}") from error
    if len(entries) > MAX_KEYS:
        raise wrong(f"it has {len(entries)} keys, the limit is {MAX_KEYS}")
    for told, values in (
        ("name", [e.name for e in entries]),
        ("hash", [e.sha256 for e in entries]),
    ):
        twice = next((i for i, value in enumerate(values) if value in values[:i]), None)
        if twice is not None:
            raise wrong(f"key {twice + 1} has the {told} of an earlier one")
    return KeyRing(entries)


def new_key(entry: dict[str, object]) -> tuple[str, str]:
    """-> (a new key, its line in the file); `entry` has the fields of KeyEntry but the hash. Raises ConfigError."""
    key = PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    fields = {"name": entry["name"], "sha256": _digest(key).hex(), **entry}
    try:
        KeyEntry.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{name} is {first['input']!r}: {first['msg']}") from error
    line: str = yaml.safe_dump([fields], default_flow_style=None, sort_keys=False, width=10_000)
    return key, line


def append_key(path: Path, name: str, line: str) -> None:
    """Write `line` at the end of the file, which is made where there is none. Raises ConfigError."""
    try:
        before = path.read_bytes() if path.exists() else b""
        if before.strip() and name in parse_keys(path, before).entries:
            raise ConfigError(
                f"{path} has a key named {name} already; delete its line to revoke it"
            )
        glue = "" if not before or before.endswith(b"\n") else "\n"
        added = (glue + line).encode()
        parse_keys(path, before + added)
        # One write at the end: a server that reads meanwhile sees all of the line or nothing.
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(file, "wb", buffering=0) as end:
            end.write(added)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _place(location: Sequence[object]) -> str:
    """Where in the list: `key 2, concurrent: `; "" for the whole of it."""
    parts = [f"key {part + 1}" for part in location if isinstance(part, int)]
    # Another name may be a key that was put there.
    parts += [part for part in location if isinstance(part, str) and part in KeyEntry.model_fields]
    return f"{', '.join(parts)}: " if parts else ""


def _wrong(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"the file of API keys {path} cannot be used: {reason}")
