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
    density: float
    refresh: int
    bytes_per_token: int  # read by a decode step at batch 1, KV of a window's middle included
    mlp_bytes: int  # of these, by the feed-forward layers

    def logits(self, windows: Sequence[Window]) -> Iterator[Logits]:
        """One array a window, in their order."""
        ...


@dataclass(frozen=True, slots=True)
class Quality:
    """One row of the report. KL is in nats per token, to the original model in float32."""

    system: str
    format: str
    policy: str
    density: float
    refresh: int
    bytes_per_token: int
    mlp_bytes: int
    kl: float  # mean over all positions
    kl_low: float  # 95 % interval of that mean, bootstrap over windows
    kl_high: float
    kl_p95: float  # over positions
    top1: float  # share of positions whose likeliest token is the original's
    perplexity: float  # of the text, under this system
    windows: int


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
    for first in range(0, len(windows), group):
        on_progress("scoring windows", first, len(windows))
        some = windows[first : first + group]
        expected = [log_softmax(logits) for logits in original(some)]
        for system, found in zip(systems, scores, strict=True):
            for window, reference, logits in zip(some, expected, system.logits(some), strict=True):
                found.append(_compare(reference, log_softmax(logits), window.targets))
    on_progress("scoring windows", len(windows), len(windows))
    return [_summarize(system, found) for system, found in zip(systems, scores, strict=True)]


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


def _summarize(system: Scored, scores: Sequence[_WindowScore]) -> Quality:
    kl = np.stack([score.kl for score in scores])  # [windows, positions]
    low, high = bootstrap_interval(kl.mean(axis=1))
    return Quality(
        system=system.system,
        format=system.format,
        policy=system.policy,
        density=system.density,
        refresh=system.refresh,
        bytes_per_token=system.bytes_per_token,
        mlp_bytes=system.mlp_bytes,
        kl=float(kl.mean()),
        kl_low=low,
        kl_high=high,
        kl_p95=float(np.quantile(kl, 0.95)),
        top1=float(np.mean([score.agrees.mean() for score in scores])),
        perplexity=float(np.exp(np.mean([score.surprise.mean() for score in scores]))),
        windows=len(scores),
    )


def bootstrap_interval(means: Array, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of [windows] numbers; positions of a window are not independent,
    so whole windows are drawn.
    """
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, len(means), (RESAMPLES, len(means)))
    low, high = np.quantile(means[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
