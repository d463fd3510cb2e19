"""Reading metadata from outside: config.json and GGUF key-value pairs."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparserve.errors import CorruptCheckpoint, UnsupportedModel


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put `path` in front of what is found wrong with its contents."""
    try:
        yield
    except (CorruptCheckpoint, UnsupportedModel) as error:
        raise type(error)(f"{path}: {error}") from error


class Fields:
    """Metadata from outside, read one value at a time. null counts as absent.

    Raises CorruptCheckpoint, which names the key and the value.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def __contains__(self, key: str) -> bool:
        return self._raw.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        whole = value.is_integer() if isinstance(value, float) else isinstance(value, int)
        if not whole or isinstance(value, bool):
            raise self._wrong(key, "an integer")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        if not abs(value) <= sys.float_info.max:  # also NaN, and integers that no float holds
            raise self._wrong(key, "a finite number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def array(self, key: str, default: list[Any] | None = None) -> list[Any]:
        value = self._value(key, default)
        if not isinstance(value, list):
            raise self._wrong(key, "an array")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """One token id, several or none."""
        value = self._raw.get(key)
        several = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in several):
            raise self._wrong(key, "a token id or a list of them")
        return tuple(several)

    def _value(self, key: str, default: Any) -> Any:
        value = self._raw.get(key)
        value = default if value is None else value
        if value is None:
            raise CorruptCheckpoint(f"{key} is missing")
        return value

    def _wrong(self, key: str, expected: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{key} is {reprlib.repr(self._raw[key])}, expected {expected}")
