"""From scores of neurons to a core: ranks, budgets, what a core covers, whether it has settled.

Scores are [layers, neurons], from 0 on, and compared in float32: larger is better, of equal ones the lower
neuron comes first, everywhere.
"""

from __future__ import annotations

import numpy as np
import torch

from sparserve.sparsity.statistics import PromptStatistics

# The stability test: a prompt has settled from so many tokens on, where so much of the core of its first
# half is in the core of the whole. CoreInfer, arXiv 2410.18311, figure 3: cores still change below 100 tokens.
STABLE_TOKENS = 128
STABLE_OVERLAP = 0.9


def neurons_of(shares: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
    """shares [layers] of neurons [layers] -> how many that is, int64 [layers]: rounded to the nearest, halves
    up, at least 1."""
    return (shares.double() * neurons + 0.5).floor().long().clamp(min=1).minimum(neurons)


def best_neurons(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The `counts` [layers] best neurons of each layer: bool [layers, neurons]."""
    order = _best_first(scores)
    first = torch.arange(scores.shape[1]) < counts[:, None]
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, order, first)


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """float64 [layers, neurons]: 1 of a layer's best neuron, down to 0 of its worst."""
    order = _best_first(scores)
    steps = torch.linspace(1, 0, scores.shape[1], dtype=torch.float64).expand(scores.shape)
    return torch.empty(scores.shape, dtype=torch.float64).scatter_(1, order, steps)


def _best_first(scores: torch.Tensor) -> torch.Tensor:
    """Neurons of each layer in order, int64 [layers, neurons].

    A score's bits order as it does, so score and neuron make one integer: numpy sorts those thirty times as
    fast as torch sorts floats stably, and the thread that does it has requests to decode.
    """
    neurons = scores.shape[1]
    bits = scores.float().contiguous().view(torch.int32).long()
    keys = bits << 32 | torch.arange(neurons - 1, -1, -1)
    rising = torch.from_numpy(np.sort(keys.numpy(), axis=1))
    return neurons - 1 - (rising.flip(1) & 0xFFFFFFFF)


def coverage(scores: torch.Tensor, members: torch.Tensor) -> float:
    """The share of the score that `members` [layers, neurons] hold, mean over layers; a layer without
    any score counts as held."""
    total = scores.sum(dim=1)
    held = (scores * members).sum(dim=1)
    return float(torch.where(total > 0, held / total.clamp(min=torch.finfo().tiny), 1.0).mean())


def is_stable(prompt: PromptStatistics, counts: torch.Tensor) -> bool:
    """Whether the prompt's own core of `counts` [layers] neurons no longer changes with its length."""
    whole, half = prompt.total(), prompt.first_half()
    if whole is None or half is None or whole.tokens < STABLE_TOKENS:
        return False
    first, last = (best_neurons(part.scores(), counts) for part in (half, whole))
    overlap = (first & last).sum(dim=1) / counts
    return float(overlap.mean()) >= STABLE_OVERLAP
