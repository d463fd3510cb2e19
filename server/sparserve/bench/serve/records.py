"""What is written down of each request while it is answered; all times in seconds from the start of its run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

GROWTH_SECONDS = 60.0  # below, memory that is touched for the first time looks like a leak


@dataclass(frozen=True, slots=True)
class Sparsity:
    """What the server says that decoding read; see SparsityReport in the protocol."""

    policy: str
    density: float
    bytes_per_token: float
    dense_share: float
    drafted_tokens: int
    accepted_tokens: int
    predicted_kl: float | None


@dataclass(slots=True)
class Record:
    """One request. What it has of the answer counts only where `error` is empty."""

    scheduled: float  # when it should have been sent
    origin: float = field(repr=False, default=0.0)  # of the times, by time.perf_counter
    sent: float = 0.0
    ended: float = 0.0
    # Of each piece of the answer that carried tokens: when it came, and how many it carried.
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0  # as the server counts them; 0: it did not say
    completion_tokens: int | None = None  # the same; None: it did not say
    error: str = ""  # a status, of which there are few
    message: str = ""
    sparsity: Sparsity | None = None

    def now(self) -> float:
        return time.perf_counter() - self.origin

    def hear(self, tokens: int) -> None:
        """A piece of the answer came."""
        self.times.append(time.perf_counter() - self.origin)
        self.tokens.append(tokens)

    @property
    def output_tokens(self) -> int:
        return sum(self.tokens) if self.completion_tokens is None else self.completion_tokens

    @property
    def ttft(self) -> float | None:
        """From the scheduled arrival."""
        return self.times[0] - self.scheduled if self.times else None

    @property
    def tpot(self) -> float | None:
        """Between the first token and the last, for each after the first."""
        if self.output_tokens < 2 or not self.times:
            return None
        return (self.times[-1] - self.times[0]) / (self.output_tokens - 1)

    @property
    def e2e(self) -> float:
        """From the scheduled arrival to the end of the answer."""
        return self.ended - self.scheduled

    @property
    def gaps(self) -> list[float]:
        """Between two pieces."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Usage:
    """Of the processes of a server, while a run went on."""

    cpu_seconds: float
    rss: Sequence[tuple[float, int]]  # (seconds from the start, bytes)
    cpus_of_others: float = 0.0  # that neither the server nor this process used, of this machine

    @property
    def growth(self) -> float | None:
        """Largest memory in the last quarter over the largest in the second, less 1: what a warm server gained. None:
        too short to tell.
        """
        end = self.rss[-1][0]
        if end < GROWTH_SECONDS:
            return None
        warm = [size for at, size in self.rss if end / 4 <= at < end / 2]
        late = [size for at, size in self.rss if at >= 3 * end / 4]
        return max(late) / max(warm) - 1 if warm else None


@dataclass(frozen=True, slots=True)
class Run:
    """One load on one target."""

    records: Sequence[Record]
    seconds: float  # until the last answer ended
    cpu_seconds: float  # of this process, which made the load
    lags: Sequence[float]  # seconds that its event loop was late, at regular looks
    server: Usage | None  # None: nobody said which process it is
