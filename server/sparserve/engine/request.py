"""What a caller asks for, validated, and what it gets back."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from enum import Enum

from sparserve.errors import InvalidRequest, SparserveError
from sparserve.sparsity.policy import DENSE, Policy

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_REQUEST_ID_LENGTH = 256


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Raises InvalidRequest on values out of range."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0  # over what top_k left
    seed: int | None = None  # None: random

    def __post_init__(self) -> None:
        _check(0 <= self.temperature <= 2, "sampling.temperature", self.temperature, "in [0, 2]")
        _check(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "in (0, 1]")
        _check(0 <= self.top_k < 2**31, "sampling.top_k", self.top_k, ">= 1, or 0 for all tokens")
        if self.seed is not None:
            _check(0 <= self.seed < 2**64, "sampling.seed", self.seed, "in [0, 2^64)")


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """When generation ends. Raises InvalidRequest on values out of range."""

    max_tokens: int | None = None  # None: the engine's default
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _check(self.max_tokens >= 1, "stopping.max_tokens", self.max_tokens, ">= 1")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(
                "stopping.stop",
                f"{len(self.stop)} stop strings given, the limit is {MAX_STOP_STRINGS}",
            )
        for stop in self.stop:
            if not 1 <= len(stop) <= MAX_STOP_LENGTH:
                raise InvalidRequest(
                    "stopping.stop",
                    f"a stop string has {len(stop)} characters; 1 to {MAX_STOP_LENGTH} are allowed",
                )


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue; `arrival` and `deadline` are on the clock of `time.monotonic`."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stopping: StoppingParams = field(default_factory=StoppingParams)
    policy: Policy = DENSE
    report_statistics: bool = False
    deadline: float | None = None
    arrival: float = field(default_factory=time.monotonic)


class FinishReason(Enum):
    """Why a request's text ended."""

    STOP_EOS = "stop_eos"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    CONTEXT = "context"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    id: int
    logprob: float  # under the model at temperature 1, before truncation


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds; zero where a request ended before."""

    queue: float
    ttft: float
    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a request: its reason, or the error that every later step would meet too."""

    reason: FinishReason
    timings: Timings
    prompt_tokens: int
    completion_tokens: int
    stop_string: str | None = None
    stop_token_id: int | None = None
    core_share: float | None = None
    error: SparserveError | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """What one step adds to a request."""

    request_id: str
    text: str = ""
    tokens: tuple[GeneratedToken, ...] = ()
    finish: Finish | None = None

    def __add__(self, later: Update) -> Update:
        return Update(
            self.request_id, self.text + later.text, self.tokens + later.tokens, later.finish
        )


def _check(valid: bool, name: str, value: float, allowed: str) -> None:
    # A NaN fails every comparison, so `valid` is False for it.
    if not valid or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidRequest(name, f"{name} is {value:g}; it must be {allowed}")
