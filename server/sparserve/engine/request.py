"""What a caller asks for, validated, and what it gets back."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import reduce
from operator import add

from sparserve.engine.constraint import CompiledConstraint
from sparserve.errors import InvalidRequest, SparserveError
from sparserve.sparsity.policy import DENSE, Policy, PolicyKind

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKENS = 256
MAX_REQUEST_ID_LENGTH = 256
MAX_CACHE_SALT_LENGTH = 256
MAX_LOGIT_BIASES = 1024
MAX_TOP_LOGPROBS = 64
MAX_PRIORITY = 100


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Raises InvalidRequest on values out of range.

    In this order: penalties, bias, allowed tokens, constraint; temperature; top_k, top_p over what it
    left, min_p, typical_p over what they left. Penalties are those of CTRL (repetition, arXiv
    1909.05858, over prompt and output) and of OpenAI's API (presence and frequency, over the output).
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0  # times the likeliest token's probability
    typical_p: float = 1.0  # arXiv 2202.00666
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: random
    n: int = 1  # choices
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    allowed_token_ids: tuple[int, ...] = ()  # (): all

    def __post_init__(self) -> None:
        _check(0 <= self.temperature <= 2, "sampling.temperature", self.temperature, "in [0, 2]")
        _check(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "in (0, 1]")
        _check(0 <= self.top_k < 2**31, "sampling.top_k", self.top_k, ">= 1, or 0 for all tokens")
        _check(0 <= self.min_p <= 1, "sampling.min_p", self.min_p, "in [0, 1]")
        _check(0 < self.typical_p <= 1, "sampling.typical_p", self.typical_p, "in (0, 1]")
        repetition = self.repetition_penalty
        allowed = "in [0.01, 10]"
        _check(0.01 <= repetition <= 10, "sampling.repetition_penalty", repetition, allowed)
        for name in ("presence_penalty", "frequency_penalty"):
            penalty = getattr(self, name)
            _check(-2 <= penalty <= 2, f"sampling.{name}", penalty, "in [-2, 2]")
        if self.seed is not None:
            _check(0 <= self.seed < 2**64, "sampling.seed", self.seed, "in [0, 2^64)")
        _check(self.n >= 1, "sampling.n", self.n, ">= 1")
        _check_count("sampling.logit_bias", "biases", len(self.logit_bias), MAX_LOGIT_BIASES)
        for token_id, bias in self.logit_bias:
            _check(-100 <= bias <= 100, f"sampling.logit_bias[{token_id}]", bias, "in [-100, 100]")

    @property
    def softmax_temperature(self) -> float:
        """What logits are divided by: float32 must hold it, and greedy choice does not ask."""
        return max(self.temperature, 1e-30) if self.temperature else 1.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.has_output_penalties

    @property
    def has_output_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """When generation ends. Raises InvalidRequest on values out of range."""

    max_tokens: int | None = None  # None: the engine's default
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False  # keep the matched stop in the text

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _check(self.max_tokens >= 1, "stopping.max_tokens", self.max_tokens, ">= 1")
        _check(self.min_tokens >= 0, "stopping.min_tokens", self.min_tokens, ">= 0")
        _check_count("stopping.stop", "stop strings", len(self.stop), MAX_STOP_STRINGS)
        for stop in self.stop:
            if not 1 <= len(stop) <= MAX_STOP_LENGTH:
                raise InvalidRequest(
                    "stopping.stop",
                    f"a stop string has {len(stop)} characters; 1 to {MAX_STOP_LENGTH} are allowed",
                )
        _check_count(
            "stopping.stop_token_ids", "stop tokens", len(self.stop_token_ids), MAX_STOP_TOKENS
        )


@dataclass(frozen=True, slots=True)
class OutputParams:
    """What comes back beside the text. Raises InvalidRequest on values out of range."""

    logprobs: bool = False  # of the generated tokens
    top_logprobs: int = 0  # likeliest tokens told beside each generated one
    prompt_logprobs: int | None = None  # the same for the prompt's tokens; None: nothing of them
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        allowed = f"in [0, {MAX_TOP_LOGPROBS}]"
        for name, value in (
            ("response.top_logprobs", self.top_logprobs),
            ("response.prompt_logprobs", self.prompt_logprobs),
        ):
            if value is not None:
                _check(0 <= value <= MAX_TOP_LOGPROBS, name, value, allowed)

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs or self.top_logprobs > 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue; `arrival` and `deadline` are on the clock of `time.monotonic`."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stopping: StoppingParams = field(default_factory=StoppingParams)
    output: OutputParams = field(default_factory=OutputParams)
    constraint: CompiledConstraint | None = None
    policy: Policy = DENSE
    report_statistics: bool = False
    cache_salt: str = ""  # prompts share cached KV only under the same salt
    owner: str = ""  # whose it is: ids are told apart by owner, and an owner can end no other's
    priority: int = 0  # among waiting requests the higher goes first
    deadline: float | None = None
    arrival: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if len(self.cache_salt) > MAX_CACHE_SALT_LENGTH:
            raise InvalidRequest(
                "cache_salt",
                f"cache_salt has {len(self.cache_salt)} characters, the limit is {MAX_CACHE_SALT_LENGTH}",
            )
        allowed = f"in [-{MAX_PRIORITY}, {MAX_PRIORITY}]"
        _check(abs(self.priority) <= MAX_PRIORITY, "priority", self.priority, allowed)


class FinishReason(Enum):
    """Why a choice's text ended."""

    STOP_EOS = "stop_eos"
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    CONTEXT = "context"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TopToken:
    id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    id: int
    # Under the model at temperature 1, before penalties, bias and truncation; None where not asked for.
    logprob: float | None = None
    top: tuple[TopToken, ...] = ()  # the likeliest, best first


@dataclass(frozen=True, slots=True)
class PromptToken:
    id: int
    logprob: float | None  # None for the first
    top: tuple[TopToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds; zero where a request ended before."""

    queue: float
    ttft: float
    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class SparsityReport:
    """What decoding read, and what was done to read less. Bytes are sums over a choice's decode steps."""

    policy: PolicyKind = PolicyKind.DENSE  # never AUTO
    expected_density: float = 1.0
    dense_mlp_bytes: int = 0  # that a dense step reads
    mlp_bytes: float = 0.0
    other_bytes: float = 0.0  # of other weights and of KV
    decoded_tokens: int = 0
    dense_tokens: int = 0  # of them, by steps that read all neurons
    refreshes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    fallbacks: int = 0
    predicted_kl: float | None = None  # nats per token
    coverage: float | None = None
    stable: bool | None = None

    @property
    def density(self) -> float:
        """Share of the feed-forward layers' bytes read for a decoded token; where there was none, the one
        that was expected."""
        dense = self.dense_mlp_bytes * self.decoded_tokens
        return self.mlp_bytes / dense if dense else self.expected_density

    @property
    def mlp_bytes_per_token(self) -> float:
        return self.density * self.dense_mlp_bytes

    @property
    def bytes_per_token(self) -> float:
        """0 where nothing was decoded."""
        return (self.mlp_bytes + self.other_bytes) / max(self.decoded_tokens, 1)

    @property
    def dense_share(self) -> float:
        return self.dense_tokens / max(self.decoded_tokens, 1)

    def __add__(self, other: SparsityReport) -> SparsityReport:
        """Of two choices of a request, whose prompt and plan are one."""
        sums = (
            "mlp_bytes", "other_bytes", "decoded_tokens", "dense_tokens", "refreshes", "drafted_tokens",
            "accepted_tokens", "fallbacks",
        )  # fmt: skip
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in sums})


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a choice: its reason, or the error that every later step would meet too."""

    reason: FinishReason
    timings: Timings
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt, whose KV was there already
    stop_string: str | None = None
    stop_token_id: int | None = None
    sparsity: SparsityReport = SparsityReport()
    core_share: float | None = None
    error: SparserveError | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """What one step adds to a choice of a request.

    `prompt` comes once a request, before its first tokens, where prompt log-probabilities were asked for.
    """

    request_id: str
    index: int = 0  # of the choice
    text: str = ""
    tokens: tuple[GeneratedToken, ...] = ()
    finish: Finish | None = None
    prompt: tuple[PromptToken, ...] = ()

    def __add__(self, later: Update) -> Update:
        assert self.index == later.index
        return Update(
            self.request_id,
            self.index,
            self.text + later.text,
            self.tokens + later.tokens,
            later.finish,
            self.prompt + later.prompt,
        )


def merge_finishes(finishes: Sequence[Finish]) -> Finish:
    """One account of a request's choices, in the order of their index: tokens are summed, times are
    those of the whole; everything else is the first choice's."""
    first = finishes[0]
    times = [finish.timings for finish in finishes]
    started = [t for t in times if t.ttft > 0]  # others ended before their first token
    ttft = min((t.ttft for t in started), default=0.0)
    timings = Timings(
        queue=min(t.queue for t in times),
        ttft=ttft,
        prefill=first.timings.prefill,
        decode=max((t.ttft + t.decode for t in started), default=0.0) - ttft,
    )
    return Finish(
        reason=first.reason,
        timings=timings,
        prompt_tokens=first.prompt_tokens,
        completion_tokens=sum(finish.completion_tokens for finish in finishes),
        cached_tokens=first.cached_tokens,
        sparsity=reduce(add, (finish.sparsity for finish in finishes)),
        core_share=first.core_share,
    )


def _check(valid: bool, name: str, value: float, allowed: str) -> None:
    # A NaN fails every comparison, so `valid` is False for it.
    if not valid or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidRequest(name, f"{name} is {value:g}; it must be {allowed}")


def _check_count(name: str, what: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequest(name, f"{count} {what} given, the limit is {limit}")
