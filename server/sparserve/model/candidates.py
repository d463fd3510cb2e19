"""From a row of logits to what leaves a step: its likeliest tokens, or the scores of given ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparserve.model.backend import NUM_CANDIDATES, Candidates, TargetScores


def top_candidates(logits: torch.Tensor, temperatures: torch.Tensor) -> Candidates:
    """logits [rows, vocab] float32, temperatures [rows] -> the sorted head of each row."""
    ids, head = _sorted_head(logits, min(NUM_CANDIDATES, logits.shape[-1]))
    below_top = logits - head[:, :1]
    return Candidates(
        token_ids=ids,
        logits=head,
        log_normalizer=_row_logsumexp(below_top / temperatures[:, None]),
        log_normalizer_1=_row_logsumexp(below_top),
        full_logits=lambda row: logits[row],
    )


def target_scores(logits: torch.Tensor, targets: Sequence[int], num_top: int) -> TargetScores:
    """logits [targets, vocab] float32, the token that followed each row -> their log-probabilities."""
    ids, head = _sorted_head(logits, max(num_top, 1))
    normalizers = _row_logsumexp(logits - head[:, :1])[:, None] + head[:, :1]  # [targets, 1]
    chosen = logits.gather(-1, torch.tensor(targets, dtype=torch.int64)[:, None])
    return TargetScores(
        logprobs=(chosen - normalizers)[:, 0],
        top_ids=ids[:, :num_top],
        top_logprobs=(head - normalizers)[:, :num_top],
    )


def concatenate_scores(parts: Sequence[TargetScores]) -> TargetScores:
    """Of one sequence's targets, cut into pieces."""
    return TargetScores(
        torch.cat([p.logprobs for p in parts]),
        torch.cat([p.top_ids for p in parts]),
        torch.cat([p.top_logprobs for p in parts]),
    )


def _sorted_head(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [rows, vocab] -> ids, logits [rows, count], by (logit descending, id ascending)."""
    top = logits.topk(min(count + 1, logits.shape[-1]), dim=-1)
    ids, last = top.indices[:, :count], top.values[:, count - 1 : count]
    # Of several logits that equal the last one topk takes any: take those of the lowest ids.
    for row in (top.values[:, count:] == last).any(dim=-1).nonzero()[:, 0].tolist():
        above, equal = ~(logits[row] <= last[row]), logits[row] == last[row]
        ids[row] = torch.cat((above.nonzero()[:, 0], equal.nonzero()[:, 0]))[:count]
    # It leaves the order of equal logits open as well: order them by id.
    by_id = ids.sort(dim=-1).values
    order = logits.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return by_id.gather(-1, order.indices), order.values


def _row_logsumexp(values: torch.Tensor) -> torch.Tensor:
    """values [rows, n] -> [rows]; row by row, for the bits of a reduction depend on the row count."""
    return torch.tensor([float(row.logsumexp(dim=0)) for row in values])
