"""One point of load: how many requests, how fast, how many at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sparserve.bench.serve.arrivals import Arrivals
from sparserve.errors import ConfigError

SweepKind = Literal["concurrency", "rate"]


@dataclass(frozen=True, slots=True)
class Load:
    """Ends after `num_prompts` requests or with `duration` seconds, after which none is sent; one of the two is None."""

    arrivals: Arrivals
    max_concurrency: int | None
    num_prompts: int | None
    duration: float | None

    def check(self) -> None:
        """Raises ConfigError."""
        self.arrivals.check()
        if (self.num_prompts is None) == (self.duration is None):
            raise ConfigError("--num-prompts and --duration both end a run; give one of the two")
        if self.duration is not None and not (self.duration > 0 and math.isfinite(self.duration)):
            raise ConfigError(f"--duration is {self.duration:g}; it must be seconds above 0")
        if self.duration is not None and self.arrivals.at_once and self.max_concurrency is None:
            raise ConfigError(
                "--duration alone would send requests without end: give --request-rate, --ramp-up or --max-concurrency"
            )

    @property
    def closed(self) -> bool:
        """So many users, each of whom sends as soon as the last answer has ended: nothing else says when."""
        return self.arrivals.at_once and self.max_concurrency is not None

    @property
    def label(self) -> str:
        if self.closed:
            return f"{self.max_concurrency} at once"
        arrivals = self.arrivals
        if arrivals.ramp is not None:
            name = f"{arrivals.ramp.kind} {arrivals.ramp.start:g} to {arrivals.ramp.end:g}/s"
        elif arrivals.at_once:
            name = "all at once"
        else:
            name = f"{arrivals.rate:g}/s"
        return name if self.max_concurrency is None else f"{name}, {self.max_concurrency} at once"


def sweep(load: Load, kind: SweepKind, values: Sequence[float]) -> list[Load]:
    """`load` at each of `values`, which are users at once or requests a second. Raises ConfigError."""
    if kind == "rate":
        if load.arrivals.ramp is not None or load.arrivals.rate != math.inf:
            raise ConfigError("--sweep sets the rate; leave --request-rate and --ramp-up out")
        return [
            replace(load, arrivals=replace(load.arrivals, rate=float(value))) for value in values
        ]
    if load.max_concurrency is not None:
        raise ConfigError("--sweep sets the concurrency; leave --max-concurrency out")
    if fractions := [value for value in values if value != int(value)]:
        raise ConfigError(f"--sweep has {fractions[0]:g}; so many users there cannot be")
    return [replace(load, max_concurrency=int(value)) for value in values]
