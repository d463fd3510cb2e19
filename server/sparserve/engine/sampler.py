"""One next token from the candidates of a row.

The distribution is softmax(logits / temperature), cut to the top_k likeliest, then to the fewest of
those that hold top_p of what is left. A step hands out only the likeliest tokens; where a choice may
lie outside of them the whole row is looked at, which gives the same token as looking at it at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparserve.engine.request import GeneratedToken, SamplingParams
from sparserve.model.backend import Candidates

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Row:
    """The likeliest tokens of one row, sorted by (logit descending, id ascending)."""

    ids: npt.NDArray[np.int64]
    logits: Array
    log_normalizer: float  # of the whole row, relative to logits[0], at the request's temperature
    log_normalizer_1: float  # at temperature 1
    full_logits: Callable[[], Array]  # [vocab]
    vocab_size: int


def rows_of(candidates: Candidates, vocab_size: int) -> list[Row]:
    ids = candidates.token_ids.cpu().numpy()
    logits = candidates.logits.cpu().double().numpy()
    normalizers = candidates.log_normalizer.tolist()
    normalizers_1 = candidates.log_normalizer_1.tolist()

    def full(row: int) -> Callable[[], Array]:
        return lambda: candidates.full_logits(row).cpu().double().numpy()

    return [
        Row(ids[i], logits[i], normalizers[i], normalizers_1[i], full(i), vocab_size)
        for i in range(len(ids))
    ]


def sample(row: Row, params: SamplingParams, seed: int, step: int) -> GeneratedToken:
    """The `step`-th token of a request; equal (row, params, seed, step) give the equal token.

    Raises FloatingPointError where the model's output is not finite (float16 overflows, damaged weights).
    """
    if not math.isfinite(row.log_normalizer_1):
        raise FloatingPointError("the model's logits are not finite")
    if params.temperature == 0:
        return _token(row, int(row.ids[0]), float(row.logits[0]))
    uniform = float(np.random.Generator(np.random.Philox(key=seed, counter=step)).random())
    top_k = params.top_k if 0 < params.top_k < row.vocab_size else row.vocab_size
    if top_k == row.vocab_size and params.top_p == 1:
        return _sample_whole(row, params.temperature, uniform)
    for size in (len(row.ids), 16 * len(row.ids), row.vocab_size):
        ids, logits = _head(row, min(size, row.vocab_size))
        probabilities = _probabilities(row, logits, params.temperature)
        kept = _truncate(probabilities, top_k, params.top_p, row.vocab_size)
        if kept is not None:
            chosen = _draw(np.cumsum(kept), uniform * float(kept.sum()))
            return _token(row, int(ids[chosen]), float(logits[chosen]))
    raise AssertionError("the complete row always holds what is kept of it")


def _sample_whole(row: Row, temperature: float, uniform: float) -> GeneratedToken:
    """Draw from the untruncated distribution: the candidates first, then the rest in id order."""
    head = np.cumsum(_probabilities(row, row.logits, temperature))
    if uniform < head[-1] or len(row.ids) == row.vocab_size:
        chosen = _draw(head, uniform)
        return _token(row, int(row.ids[chosen]), float(row.logits[chosen]))
    logits = row.full_logits()
    rest = _probabilities(row, logits, temperature)
    rest[row.ids] = 0.0
    below = (uniform - float(head[-1])) / (1 - float(head[-1]))  # uniform in [0, 1) again
    chosen = _draw(np.cumsum(rest), below * float(rest.sum()))
    return _token(row, chosen, float(logits[chosen]))


def _probabilities(row: Row, logits: Array, temperature: float) -> Array:
    """Of `logits`, some of the row's, under the row's whole distribution."""
    exponents: Array = (logits - row.logits[0]) / temperature - row.log_normalizer
    return np.exp(exponents)


def _truncate(probabilities: Array, top_k: int, top_p: float, vocab_size: int) -> Array | None:
    """What top_k and top_p keep of a row's sorted head; None where they keep more than the head."""
    complete = len(probabilities) == vocab_size
    if top_k > len(probabilities) and top_k < vocab_size and not complete:
        return None
    kept = probabilities[:top_k]
    holds_all = complete or top_k <= len(probabilities)
    if top_p < 1:
        total = float(kept.sum()) if holds_all else 1.0
        last = int(np.searchsorted(np.cumsum(kept), top_p * total))
        if last < len(kept):
            return kept[: last + 1]
    return kept if holds_all else None


def _draw(cumulative: Array, target: float) -> int:
    """Index whose cumulative weight first exceeds `target`; rounding cannot lead past the end."""
    index = int(np.searchsorted(cumulative, target, side="right"))
    return min(index, int(np.searchsorted(cumulative, cumulative[-1])))


def _head(row: Row, size: int) -> tuple[npt.NDArray[np.int64], Array]:
    """The `size` likeliest tokens, sorted as the candidates are."""
    if size <= len(row.ids):
        return row.ids, row.logits
    logits = row.full_logits()
    ids = np.argpartition(-logits, size - 1)[:size]
    ids = ids[np.lexsort((ids, -logits[ids]))]
    return ids, logits[ids]


def _token(row: Row, token_id: int, logit: float) -> GeneratedToken:
    return GeneratedToken(token_id, logit - float(row.logits[0]) - row.log_normalizer_1)
