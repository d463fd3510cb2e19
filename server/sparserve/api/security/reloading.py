"""Files that are read again when they change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from sparserve.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")
_MAX_BYTES = 1 << 20


class ReloadedFiles(Generic[T]):
    """What `parse` makes of the contents of some files, made anew once they change.

    Where that fails the last good value stays. Contents are compared, not times: those of a mounted
    Secret need not move, and a clock may.
    """

    def __init__(
        self, what: str, paths: Sequence[Path], parse: Callable[[Sequence[bytes]], T]
    ) -> None:
        """`parse` raises ConfigError, and so does this."""
        self._what = what
        self._paths = paths
        self._parse = parse
        self._seen: list[bytes] | str = self._read()  # a text: why they could not be read
        self.value = parse(self._seen)

    def poll(self) -> bool | None:
        """Look at the files; may block. -> whether what they say now is in use; None: nothing changed."""
        try:
            contents = self._read()
        except ConfigError as error:
            return None if self._seen == str(error) else self._failed(str(error), str(error))
        if contents == self._seen:
            return None
        try:
            self.value = self._parse(contents)
        except ConfigError as error:
            return self._failed(contents, str(error))
        except (
            Exception
        ) as error:  # of a library, of what nobody foresaw; its text may quote the file
            return self._failed(contents, f"{type(error).__name__} while it was read")
        self._seen = contents
        log.info("%s changed and is in use", self._what)
        return True

    def _failed(self, seen: list[bytes] | str, reason: str) -> bool:
        self._seen = seen
        log.error("%s changed and cannot be used, the former stays: %s", self._what, reason)
        return False

    def _read(self) -> list[bytes]:
        return [_read(path) for path in self._paths]


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no file")
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{path} has more than {_MAX_BYTES >> 20} MiB")
    return content
