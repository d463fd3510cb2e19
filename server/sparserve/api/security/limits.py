"""What a key may use: calls and tokens a minute, and calls at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from sparserve.errors import KeyLimitReached

Clock = Callable[[], float]
_ROUNDING = 1e-6  # of a token or a request: filling adds up fractions
_BUSY_SECONDS = 1.0  # until one of the calls at once may have ended: nobody knows


@dataclass(frozen=True, slots=True)
class Limits:
    """0: none."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrent: int = 0


class Bucket:
    """Holds a minute's worth, fills up evenly, and can owe: what is taken may only be known afterwards."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def resize(self, per_minute: int, now: float) -> None:
        """What was used stays used, up to the new minute's worth: nobody pays off a larger one for hours."""
        self._fill(now)
        used = self._per_minute - self._level
        self._level, self._per_minute = per_minute - min(used, float(per_minute)), per_minute

    def seconds_until(self, amount: float, now: float) -> float:
        """0: `amount` is there. More than it can hold is there once it is full."""
        self._fill(now)
        missing = min(amount, self._per_minute) - self._level
        return missing / self._per_minute * 60 if missing > _ROUNDING else 0.0

    def take(self, amount: float, now: float) -> None:
        self._fill(now)
        self._level -= amount

    def _fill(self, now: float) -> None:
        gained = (now - self._at) / 60 * self._per_minute
        self._level = min(self._level + gained, float(self._per_minute))
        self._at = now


class Quota:
    """What one key has used of its limits; outlives a reload of the file. Use it on the event loop."""

    def __init__(self, name: str, limits: Limits, clock: Clock = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._running = 0
        self.limits = limits
        self._requests = self._bucket(limits.requests_per_minute)
        self._tokens = self._bucket(limits.tokens_per_minute)

    def change(self, limits: Limits) -> None:
        before, self.limits = self.limits, limits
        if limits.requests_per_minute != before.requests_per_minute:
            self._requests = self._resized(self._requests, limits.requests_per_minute)
        if limits.tokens_per_minute != before.tokens_per_minute:
            self._tokens = self._resized(self._tokens, limits.tokens_per_minute)

    def begin(self) -> None:
        """A call; `end` follows whatever becomes of it. Raises KeyLimitReached, and then none follows."""
        if self.limits.concurrent and self._running >= self.limits.concurrent:
            raise self._reached(
                "concurrent", self.limits.concurrent, "calls at once", _BUSY_SECONDS
            )
        if self._requests:
            wait = self._requests.seconds_until(1, self._clock())
            if wait > 0:
                limit = self.limits.requests_per_minute
                raise self._reached("requests_per_minute", limit, "requests a minute", wait)
            self._requests.take(1, self._clock())
        self._running += 1

    def end(self) -> None:
        self._running -= 1

    def check_tokens(self, tokens: int = 1) -> None:
        """Whether a prompt of so many may begin. Raises KeyLimitReached."""
        if self._tokens is None:
            return
        wait = self._tokens.seconds_until(tokens, self._clock())
        if wait > 0:
            limit = self.limits.tokens_per_minute
            raise self._reached("tokens_per_minute", limit, "tokens a minute", wait)

    def charge(self, tokens: int) -> None:
        if self._tokens:
            self._tokens.take(tokens, self._clock())

    def _bucket(self, per_minute: int) -> Bucket | None:
        return Bucket(per_minute, self._clock()) if per_minute else None

    def _resized(self, bucket: Bucket | None, per_minute: int) -> Bucket | None:
        if bucket is None or not per_minute:
            return self._bucket(per_minute)
        bucket.resize(per_minute, self._clock())
        return bucket

    def _reached(self, limit: str, value: int, what: str, wait: float) -> KeyLimitReached:
        # Up to a whole millisecond: who comes back when told must not be too early.
        return KeyLimitReached(self._name, limit, value, what, math.ceil(wait * 1000) / 1000)
