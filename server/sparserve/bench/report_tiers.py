"""The rows of a report, and what is fastest at each limit of KL: with and without what a model can have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparserve.bench.quality_points import OURS
from sparserve.bench.rounds import median_ratio
from sparserve.bench.systems import DENSE_POLICY


@dataclass(frozen=True, slots=True)
class Row:
    """One system, its speed and its quality measured alike."""

    system: str  # OURS, or a peer
    label: str  # of no other row
    format: str
    recipe: str | None  # that its weights were compressed by
    policy: str
    pruned: float  # share of the original's parameters that it lacks
    healed: str | None  # what its weights were healed through; None: they were not
    # Bits of a weight of the original with its share of scales, zeros, low-rank factors and bases: of the layers'
    # matrices, and of all tensors of the model, where a tied LM head counts once. What is pruned has none.
    bits_decoder: float
    bits_file: float
    kl: float  # to the original in float32, nats per token; of the 95 % interval the ends
    kl_low: float
    kl_high: float
    top1: float
    perplexity: float
    density: float  # share of the feed-forward bytes that a token of the scored text read
    batch: int
    context: int  # prompt tokens
    new_tokens: int
    tokens_per_second: float  # of all sequences together; median, slowest and fastest round
    tokens_per_second_low: float
    tokens_per_second_high: float
    rounds: Sequence[float]  # tokens/s of each
    read_ceiling_gb_s: float
    percent_of_byte_bound: float
    ratio: float  # of its speed to the baseline's: median of the rounds' own


# What rows of ours have or have not.
FEATURES: Mapping[str, Callable[[Row], bool]] = {
    "sparsity": lambda row: row.policy != DENSE_POLICY,
    "pruning": lambda row: row.pruned > 0,
    "healing": lambda row: row.healed is not None,
}


@dataclass(frozen=True, slots=True)
class Pair:
    """The fastest of ours without a feature and with it; None where there is none."""

    without: Row | None
    having: Row | None

    @property
    def ratio(self) -> float | None:
        """Of the speed with it to that without."""
        return _ratio(self.having, self.without)

    def as_json(self) -> dict[str, Any]:
        labels = {"without": _label(self.without), "with": _label(self.having)}
        return {**labels, "ratio": self.ratio}


@dataclass(frozen=True, slots=True)
class Tier:
    """The fastest rows whose KL is at most `kl`; None where there is none."""

    kl: float
    ours: Row | None
    peer: Row | None
    features: Mapping[str, Pair]  # by the names of FEATURES

    @property
    def ratio(self) -> float | None:
        """Of our speed to the peer's."""
        return _ratio(self.ours, self.peer)

    def as_json(self) -> dict[str, Any]:
        best = {"ours": _label(self.ours), "peer": _label(self.peer), "ratio": self.ratio}
        pairs = {name: pair.as_json() for name, pair in self.features.items()}
        return {"kl": self.kl, **best, **pairs}


def tiers_of(rows: Sequence[Row], limits: Iterable[float]) -> list[Tier]:
    return [_tier([row for row in rows if row.kl <= limit], limit) for limit in limits]


def _tier(within: Sequence[Row], limit: float) -> Tier:
    ours = [row for row in within if row.system == OURS]
    features = {name: _pair(ours, has) for name, has in FEATURES.items()}
    peer = _fastest(row for row in within if row.system != OURS)
    return Tier(limit, _fastest(ours), peer, features)


def _pair(rows: Sequence[Row], has: Callable[[Row], bool]) -> Pair:
    return Pair(_fastest(row for row in rows if not has(row)), _fastest(filter(has, rows)))


def _fastest(rows: Iterable[Row]) -> Row | None:
    return max(rows, key=lambda row: row.tokens_per_second, default=None)


def _ratio(row: Row | None, against: Row | None) -> float | None:
    """The median of the rounds' own."""
    return None if row is None or against is None else median_ratio(row.rounds, against.rounds)


def _label(row: Row | None) -> str | None:
    return None if row is None else row.label
