"""When requests arrive: a schedule from a seed, made before anything is sent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from sparserve.errors import ConfigError

MAX_ARRIVALS = 10_000_000
RampKind = Literal["linear", "exponential"]
Times = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ramp:
    """Requests a second that change over the run."""

    kind: RampKind
    start: float
    end: float

    @classmethod
    def parse(cls, text: str) -> Ramp:
        """Of "linear:1:20". Raises ConfigError."""
        words = text.split(":")
        kinds = get_args(RampKind)
        try:
            kind, start, end = words[0], *map(float, words[1:])
        except ValueError:
            kind, start, end = "", 0.0, 0.0
        if kind not in kinds or not all(rate > 0 and math.isfinite(rate) for rate in (start, end)):
            raise ConfigError(
                f"--ramp-up is {text!r}; it must be {' or '.join(kinds)} with two rates above 0, such as linear:1:20"
            )
        return cls(kind, start, end)  # type: ignore[arg-type]

    def expected(self, seconds: float) -> float:
        """Arrivals of a run of so many seconds."""
        return seconds * self._mean_rate

    def length(self, arrivals: float) -> float:
        """Seconds in which so many are expected."""
        return arrivals / self._mean_rate

    def times(self, counts: Times, seconds: float) -> Times:
        """When as many arrivals as `counts` are expected, on a ramp of `seconds`; after it the last rate holds."""
        whole = self.expected(seconds)
        on_ramp = np.minimum(counts, whole)
        if self.kind == "linear":
            slope = (self.end - self.start) / seconds
            root = np.sqrt(np.maximum(self.start**2 + 2 * slope * on_ramp, 0))
            found = 2 * on_ramp / (self.start + root)
        elif self.start == self.end:
            found = on_ramp / self.start
        else:
            growth = math.log(self.end / self.start) / seconds
            found = np.log1p(growth * on_ramp / self.start) / growth
        return np.asarray(found + (counts - on_ramp) / self.end)

    @property
    def _mean_rate(self) -> float:
        if self.kind == "linear" or self.start == self.end:
            return (self.start + self.end) / 2
        return (self.end - self.start) / math.log(self.end / self.start)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """A gamma process: `burstiness` is the shape of the times between two arrivals, whose coefficient of variation is
    burstiness ** -0.5. 1 is Poisson, below it requests come in bursts, above more evenly.
    """

    rate: float = math.inf  # requests a second; inf: all at once
    burstiness: float = 1.0
    ramp: Ramp | None = None  # in place of `rate`

    def check(self) -> None:
        """Raises ConfigError."""
        if not self.rate > 0:
            raise ConfigError(f"--request-rate is {self.rate:g}; it must be above 0, or inf")
        if not (self.burstiness > 0 and math.isfinite(self.burstiness)):
            raise ConfigError(f"--burstiness is {self.burstiness:g}; it must be above 0")
        if self.ramp is not None and self.rate != math.inf:
            raise ConfigError("--ramp-up is in place of --request-rate; leave one of the two out")

    @property
    def at_once(self) -> bool:
        return self.ramp is None and self.rate == math.inf

    def schedule(
        self, seed: tuple[int, ...], *, count: int | None, duration: float | None
    ) -> Times:
        """Seconds from the start, in order: of `count` arrivals, or of those within `duration`; one is None.

        The same seed gives the same schedule. Raises ConfigError of more than MAX_ARRIVALS.
        """
        if self.at_once:
            assert count is not None, "all at once have no end but a count"
            return np.zeros(count)
        ramp = self.ramp or Ramp("linear", self.rate, self.rate)
        if count is not None:
            seconds, expected = ramp.length(count), float(count)
        else:
            assert duration is not None
            seconds, expected = duration, ramp.expected(duration)
        if expected > MAX_ARRIVALS:
            raise ConfigError(
                f"{expected:.0f} requests are more than the {MAX_ARRIVALS} of one run; lower --request-rate or --duration"
            )
        times = ramp.times(self._unit_arrivals(seed, expected, count), seconds)
        return times if count is not None else times[times < seconds]

    def _unit_arrivals(self, seed: tuple[int, ...], expected: float, count: int | None) -> Times:
        """At a rate of 1: `count` of them, or enough to pass `expected`."""
        source = np.random.default_rng(seed)
        shape = self.burstiness

        def draw(size: int) -> Times:
            return source.gamma(shape, 1 / shape, size)

        if count is not None:
            return np.cumsum(draw(count))
        gaps = draw(int(expected) + 1)
        while gaps.sum() < expected:
            gaps = np.concatenate([gaps, draw(max(16, int(expected) // 8))])
        return np.cumsum(gaps)
