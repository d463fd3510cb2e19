"""One next token from a row of logits.

The distribution is softmax(logits / temperature), cut to the top_k likeliest, then to the fewest of
those that hold top_p of what is left, then to those within min_p of the likeliest, then to the
locally typical ones (arXiv 2202.00666). A step hands out only the likeliest tokens of each row; where
a choice may lie outside of them, the whole row is looked at, without sorting it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sparserve.engine.request import GeneratedToken, SamplingParams, TopToken
from sparserve.model.backend import NUM_CANDIDATES, Candidates
from sparserve.model.candidates import top_candidates

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_BINS = 4096  # of a selection by weight


@dataclass(frozen=True, slots=True)
class Row:
    """The likeliest tokens of one row, sorted by (logit descending, id ascending)."""

    ids: npt.NDArray[np.int32] | npt.NDArray[np.int64]
    logits: Array
    log_normalizer: float  # of the whole row, relative to logits[0], at the request's temperature
    log_normalizer_1: float  # at temperature 1
    full_logits: Callable[[], npt.NDArray[np.float32]]  # [vocab]
    vocab_size: int
    head_only: bool = (
        False  # as many tokens as are needed, and neither normalizers nor other logits
    )


def rows_of(candidates: Candidates, vocab_size: int) -> list[Row]:
    ids = candidates.token_ids.cpu().numpy()
    logits = candidates.logits.cpu().numpy().astype(np.float64)
    normalizers = candidates.log_normalizer.tolist()
    normalizers_1 = candidates.log_normalizer_1.tolist()

    def full(row: int) -> Callable[[], npt.NDArray[np.float32]]:
        return lambda: candidates.full_logits(row).cpu().numpy()

    return [
        Row(
            ids[i, : count or None],
            logits[i, : count or None],
            normalizers[i],
            normalizers_1[i],
            full(i),
            vocab_size,
            head_only=count > 0,
        )
        for i, count in enumerate(candidates.known or [0] * len(ids))
    ]


def adjusted_row(logits: npt.NDArray[np.float32], temperature: float) -> Row:
    """The row of logits that a request changed, [vocab]; -inf is a token that must not come."""
    candidates = top_candidates(torch.from_numpy(logits)[None], torch.tensor([temperature]))
    return rows_of(candidates, len(logits))[0]


def candidates_for(params: SamplingParams, vocab_size: int) -> int:
    """Candidates of a row that `sample` depends on; 0: the whole row, for its normalizer at least."""
    if params.temperature == 0:
        return 1
    return params.top_k if 0 < params.top_k <= min(NUM_CANDIDATES, vocab_size - 1) else 0


def sample(row: Row, params: SamplingParams, seed: int, choice: int, step: int) -> int:
    """Id of the `step`-th token of a choice; equal arguments give the equal token.

    Raises FloatingPointError where no token has a finite probability: the model's output overflowed,
    or all of its tokens are forbidden.
    """
    if not row.head_only and not math.isfinite(row.log_normalizer):
        raise FloatingPointError("no token has a finite probability")
    if params.temperature == 0:
        return int(row.ids[0])
    generator = np.random.Generator(np.random.Philox(key=seed + (choice << 64), counter=step))
    uniform = float(generator.random())
    top_k = params.top_k if 0 < params.top_k < row.vocab_size else row.vocab_size
    if top_k == row.vocab_size and params.top_p == params.typical_p == 1 and params.min_p == 0:
        return _sample_whole(row, params.softmax_temperature, uniform)
    if top_k <= len(row.ids):
        # The others do not count, nor what all of them sum up to.
        weights = np.exp((row.logits[:top_k] - row.logits[0]) / params.softmax_temperature)
        return int(row.ids[_draw(_truncate_known(weights, params), uniform)])
    probabilities = _probabilities(row, row.logits, params.softmax_temperature)
    kept = _truncate_head(probabilities, top_k, params, row.vocab_size)
    if kept is not None:
        return int(row.ids[_draw(kept, uniform)])
    whole = _probabilities(row, row.full_logits().astype(np.float64), params.softmax_temperature)
    return _draw(_truncate_whole(whole, top_k, params), uniform)


def generated_token(row: Row, token_id: int, num_top: int) -> GeneratedToken:
    """A token with its log-probability, and those of the `num_top` likeliest, in the model's own row."""
    at = int((row.ids == token_id).argmax())  # 0 where it is none of them
    in_head = row.ids[at] == token_id
    logprob = _logprob(row, float(row.logits[at] if in_head else row.full_logits()[token_id]))
    if not num_top:
        return GeneratedToken(token_id, logprob, ())
    top = zip(row.ids[:num_top].tolist(), row.logits[:num_top].tolist(), strict=True)
    return GeneratedToken(
        token_id, logprob, tuple(TopToken(i, _logprob(row, logit)) for i, logit in top)
    )


def _logprob(row: Row, logit: float) -> float:
    return logit - float(row.logits[0]) - row.log_normalizer_1


def _sample_whole(row: Row, temperature: float, uniform: float) -> int:
    """Draw from the untruncated distribution: the candidates first, then the rest in id order."""
    head = np.cumsum(_probabilities(row, row.logits, temperature))
    mass = float(head[-1])
    if uniform < mass or len(row.ids) == row.vocab_size:
        return int(row.ids[_index_at(head, uniform)])
    rest = _probabilities(row, row.full_logits().astype(np.float64), temperature)
    rest[row.ids] = 0.0
    if not rest.any():  # what the candidates lack of 1 is rounding
        return int(row.ids[_index_at(head, mass)])
    return _draw(rest, (uniform - mass) / (1 - mass))  # uniform in [0, 1) again


def _probabilities(row: Row, logits: Array, temperature: float) -> Array:
    """Of `logits`, some of the row's, under the row's whole distribution."""
    exponents: Array = (logits - row.logits[0]) / temperature - row.log_normalizer
    return np.exp(exponents)


def _truncate_known(weights: Array, params: SamplingParams) -> Array:
    """What is kept of the tokens that top_k keeps, sorted; in proportion to their probabilities.

    All but typical_p keep the likeliest so many, so the fewest of these wins.
    """
    count = len(weights)
    if params.top_p < 1:
        share = params.top_p * float(weights.sum())
        count = min(count, int(np.searchsorted(np.cumsum(weights), share)) + 1)
    if params.min_p > 0:
        count = min(count, int((weights >= params.min_p * weights[0]).sum()))
    kept = weights[:count]
    return kept if params.typical_p == 1 else kept * _typical(kept, params.typical_p)


def _truncate_head(
    probabilities: Array, top_k: int, params: SamplingParams, vocab_size: int
) -> Array | None:
    """What is kept of a row's sorted head where top_k keeps more; None where more may be kept in all."""
    size = len(probabilities)
    count = vocab_size
    if params.top_p < 1:
        if top_k < vocab_size:
            return None  # a share of what top_k keeps, which is not known here
        count = int(np.searchsorted(np.cumsum(probabilities), params.top_p)) + 1
    if params.min_p > 0:
        likely = int((probabilities >= params.min_p * probabilities[0]).sum())
        count = min(count, likely if likely < size else vocab_size)
    if count > size:
        return None
    kept = probabilities[:count]
    return kept if params.typical_p == 1 else kept * _typical(kept, params.typical_p)


def _truncate_whole(probabilities: Array, top_k: int, params: SamplingParams) -> Array:
    """The same for a whole row in id order: what is not kept becomes 0."""
    kept = probabilities.copy()
    if top_k < len(kept):
        least = np.partition(kept, len(kept) - top_k)[len(kept) - top_k]
        equal = np.flatnonzero(kept == least)
        too_many = int((kept >= least).sum()) - top_k
        kept[kept < least] = 0
        kept[equal[len(equal) - too_many :]] = 0
    if params.top_p < 1:
        kept *= _least_holding(-kept, kept, params.top_p * float(kept.sum()))
    kept[kept < params.min_p * probabilities.max()] = 0
    return kept if params.typical_p == 1 else kept * _typical(kept, params.typical_p)


def _typical(probabilities: Array, share: float) -> Mask:
    """The tokens nearest to the expected information that hold `share` of the probability."""
    total = float(probabilities.sum())
    with np.errstate(divide="ignore"):
        information = -np.log(probabilities / total)
    possible = probabilities > 0
    entropy = float((probabilities[possible] / total) @ information[possible])
    return _least_holding(np.abs(information - entropy), probabilities, share * total)


def _least_holding(keys: Array, weights: Array, target: float) -> Mask:
    """The fewest items, smallest keys first and then in order, whose weights reach `target`.

    By bins that narrow around the last one kept: only what is left in one bin is sorted.
    """
    kept = np.zeros(len(keys), dtype=np.bool_)
    left = np.flatnonzero(weights > 0)
    while len(left) > _BINS:
        low, high = float(keys[left].min()), float(keys[left].max())
        if low == high:
            break
        bins = ((keys[left] - low) * (_BINS / (high - low))).astype(np.int64).clip(0, _BINS - 1)
        reached = np.cumsum(np.bincount(bins, weights[left], minlength=_BINS))
        at = int(np.searchsorted(reached, target))
        kept[left[bins < at]] = True
        if at == _BINS:  # rounding: all together are just short of the target
            return kept
        target -= float(reached[at - 1]) if at else 0.0
        left = left[bins == at]
    left = left[np.argsort(keys[left], kind="stable")]
    last = int(np.searchsorted(np.cumsum(weights[left]), target))
    kept[left[: last + 1]] = True
    return kept


def _draw(weights: Array, uniform: float) -> int:
    """Index drawn in proportion to `weights`."""
    cumulative = np.cumsum(weights)
    assert cumulative[-1] > 0, "there is something to draw"
    return _index_at(cumulative, uniform * float(cumulative[-1]))


def _index_at(cumulative: Array, target: float) -> int:
    """Index whose cumulative weight first exceeds `target`; rounding cannot lead past the end."""
    index = int(np.searchsorted(cumulative, target, side="right"))
    return min(index, int(np.searchsorted(cumulative, cumulative[-1])))
