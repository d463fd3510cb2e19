"""How far decoded text is from the original model's: KL, top-1 agreement, perplexity.

Each window of a text is a prompt, prefilled as a server would, and a continuation that is fed token by
token through decode (teacher forcing). Only the positions that decode computed are compared, for
prefill says nothing about formats and policies that only decode uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sparserve.errors import ConfigError

Logits = npt.NDArray[np.float32]  # [decoded positions, vocab]
Array = npt.NDArray[np.float64]

RESAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True, slots=True)
class Window:
    """`fed` are the tokens that decode takes in, `targets` those that followed each of them."""

    prompt: tuple[int, ...]
    fed: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Positions that its KV takes."""
        return len(self.prompt) + len(self.fed)


class Scored(Protocol):
    """A system whose decoded positions are compared."""

    system: str
    format: str
    policy: str
    refresh: int
    predicted_kl: float | None
    resolved: str | None

    # What it reads may be known only after its logits were asked for.
    @property
    def density(self) -> float: ...
    @property
    def bytes_per_token(self) -> int:
        """Read by a decode step at batch 1, KV of a window's middle included."""
        ...

    @property
    def mlp_bytes(self) -> int:
        """Of these, by the feed-forward layers."""
        ...

    @property
    def dense(self) -> Scored | None:
        """The same without a policy, which it is compared with beside the original; None where it has none."""
        ...

    def logits(self, windows: Sequence[Window]) -> Iterator[Logits]:
        """One array a window, in their order."""
        ...


@dataclass(frozen=True, slots=True)
class Quality:
    """One row of the report. KL is in nats per token: to the original model in float32, and of a policy to the
    same format dense (None: the row is dense itself).
    """

    system: str
    format: str
    policy: str
    density: float  # share of the feed-forward layers' bytes that a decoded token read
    refresh: int  # tokens from one dense pass over them to the next; 0: none
    bytes_per_token: int
    mlp_bytes: int
    kl: float  # mean over all positions
    kl_low: float  # 95 % interval of that mean, bootstrap over windows
    kl_high: float
    kl_p95: float  # over positions
    kl_p95_window: float  # over the means of windows
    top1: float  # share of positions whose likeliest token is the original's
    perplexity: float  # of the text, under this system
    windows: int
    resolved: str | None  # what a policy that leaves it to the index came to
    predicted_kl: float | None  # to dense, by the calibrated index
    kl_dense: float | None
    kl_dense_low: float | None
    kl_dense_high: float | None
    kl_dense_p95_window: float | None
    top1_dense: float | None


def cut_windows(
    token_ids: Sequence[int], count: int, prompt_tokens: int, decode_tokens: int
) -> list[Window]:
    """`count` windows, evenly spread over the text and not overlapping. Raises ConfigError."""
    length = prompt_tokens + decode_tokens + 1
    fits = len(token_ids) // length
    if fits < count:
        raise ConfigError(
            f"the text has {len(token_ids)} tokens, enough for {fits} windows of {length}; {count} were "
            "asked for: give more text, or lower --windows, --prompt-tokens or --decode-tokens"
        )
    windows = []
    for index in range(count):
        start = index * fits // count * length
        tokens = tuple(token_ids[start : start + length])
        rest = tokens[prompt_tokens:]
        windows.append(Window(tokens[:prompt_tokens], rest[:-1], rest[1:]))
    return windows


def measure(
    original: Callable[[Sequence[Window]], Iterator[Logits]],
    systems: Sequence[Scored],
    windows: Sequence[Window],
    on_progress: Callable[[str, int, int], None],
    group: int,
) -> list[Quality]:
    """Score every system on the same windows, `group` of them at once; `original` gives the logits to
    compare with.
    """
    scores: list[list[_WindowScore]] = [[] for _ in systems]
    to_dense: list[list[_WindowScore]] = [[] for _ in systems]
    bases = {id(system.dense) for system in systems if system.dense is not None}
    for first in range(0, len(windows), group):
        on_progress("scoring windows", first, len(windows))
        some = windows[first : first + group]
        expected = [log_softmax(logits) for logits in original(some)]
        kept = _Kept(some)
        for system, found, own in zip(systems, scores, to_dense, strict=True):
            against = None if system.dense is None else kept.logits(system.dense)
            given = kept.logits(system) if id(system) in bases else system.logits(some)
            for i, (window, logits) in enumerate(zip(some, given, strict=True)):
                scored = log_softmax(logits)
                found.append(_compare(expected[i], scored, window.targets))
                if against is not None:
                    own.append(_compare(log_softmax(against[i]), scored, window.targets))
    on_progress("scoring windows", len(windows), len(windows))
    rows = zip(systems, scores, to_dense, strict=True)
    return [_summarize(system, found, own) for system, found, own in rows]


class _Kept:
    """Logits of some windows by the dense system that was asked for last: policies of one format follow
    each other, and a system of a large vocabulary fills a gigabyte."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self._windows = windows
        self._system: Scored | None = None
        self._logits: list[Logits] = []

    def logits(self, system: Scored) -> list[Logits]:
        if self._system is not system:
            self._logits = []  # before there are others
            self._system, self._logits = system, list(system.logits(self._windows))
        return self._logits


def log_softmax(logits: Logits) -> Array:
    """[positions, vocab] in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


@dataclass(frozen=True, slots=True)
class _WindowScore:
    kl: Array  # [positions]
    agrees: npt.NDArray[np.bool_]  # [positions]
    surprise: Array  # [positions], nats


def _compare(reference: Array, scored: Array, targets: Sequence[int]) -> _WindowScore:
    """KL(reference || scored) of each position; reference, scored [positions, vocab] log-probabilities."""
    kl = (np.exp(reference) * (reference - scored)).sum(axis=1)
    rows = np.arange(len(targets))
    return _WindowScore(
        kl=kl.clip(min=0),  # rounding may leave it a little below
        agrees=reference.argmax(axis=1) == scored.argmax(axis=1),
        surprise=-scored[rows, list(targets)],
    )


def _summarize(
    system: Scored, scores: Sequence[_WindowScore], to_dense: Sequence[_WindowScore]
) -> Quality:
    original, dense = _Kl.of(scores), _Kl.of(to_dense) if to_dense else None
    return Quality(
        system=system.system,
        format=system.format,
        policy=system.policy,
        density=round(system.density, 4),
        refresh=system.refresh,
        bytes_per_token=system.bytes_per_token,
        mlp_bytes=system.mlp_bytes,
        kl=original.mean,
        kl_low=original.low,
        kl_high=original.high,
        kl_p95=original.p95,
        kl_p95_window=original.p95_window,
        top1=_top1(scores),
        perplexity=float(np.exp(np.mean([score.surprise.mean() for score in scores]))),
        windows=len(scores),
        resolved=system.resolved,
        predicted_kl=system.predicted_kl,
        kl_dense=dense.mean if dense else None,
        kl_dense_low=dense.low if dense else None,
        kl_dense_high=dense.high if dense else None,
        kl_dense_p95_window=dense.p95_window if dense else None,
        top1_dense=_top1(to_dense) if dense else None,
    )


@dataclass(frozen=True, slots=True)
class _Kl:
    mean: float
    low: float
    high: float
    p95: float
    p95_window: float

    @classmethod
    def of(cls, scores: Sequence[_WindowScore]) -> _Kl:
        kl = np.stack([score.kl for score in scores])  # [windows, positions]
        means = kl.mean(axis=1)
        low, high = bootstrap_interval(means)
        p95, p95_window = np.quantile(kl, 0.95), np.quantile(means, 0.95)
        return cls(float(kl.mean()), low, high, float(p95), float(p95_window))


def _top1(scores: Sequence[_WindowScore]) -> float:
    return float(np.mean([score.agrees.mean() for score in scores]))


def bootstrap_interval(means: Array, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of [windows] numbers; positions of a window are not independent,
    so whole windows are drawn.
    """
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, len(means), (RESAMPLES, len(means)))
    low, high = np.quantile(means[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
