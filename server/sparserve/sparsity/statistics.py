"""Neuron statistics of a prompt, gathered while it is prefilled.

The norm score of GRIFFIN (arXiv 2402.19427): with a_t = silu(gate_t) * up_t the input of the down
projection at token t, a neuron's score is sum_t (a_tn / |a_t|_2)^2.

Sums are kept as integers in units of 2^-32: integer addition is exact, so a prompt's statistics do
not depend on how it was cut into chunks, batched, preempted or resumed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

UNIT = 2.0**-32


@dataclass(slots=True)
class NeuronStatistics:
    """Norm-score sums over the tokens of one sequence; add with `+=`."""

    sums: torch.Tensor  # [num_layers, intermediate] int64, in units of UNIT
    tokens: int = 0

    @classmethod
    def zeros(cls, num_layers: int, intermediate_size: int) -> NeuronStatistics:
        return cls(torch.zeros(num_layers, intermediate_size, dtype=torch.int64))

    def __iadd__(self, other: NeuronStatistics) -> NeuronStatistics:
        self.sums = self.sums + other.sums  # not in place: a forward returns inference tensors
        self.tokens += other.tokens
        return self

    def scores(self) -> torch.Tensor:
        """[num_layers, intermediate] fp64; each layer sums to `tokens` (up to rounding)."""
        return self.sums.double() * UNIT

    def share_holding(self, fraction: float) -> float:
        """The least share of neurons, mean over layers, that holds `fraction` of the score."""
        ordered = self.scores().sort(dim=1, descending=True).values.cumsum(dim=1)
        wanted = fraction * ordered[:, -1:]
        needed = (ordered < wanted).sum(dim=1) + 1
        return float((needed.double() / ordered.shape[1]).mean())


def norm_score(activations: torch.Tensor) -> torch.Tensor:
    """Score of each token and neuron, `activations` [tokens, intermediate] -> int64 of that shape.

    A token whose activations are all zero scores zero. Raises nothing; inputs are finite.
    """
    squares = activations.double().square()  # of any float32 in range, none lost to zero
    total = squares.sum(dim=1, keepdim=True)
    units = 1 / UNIT / total.where(total > 0, 1.0)
    return (squares * units).round().to(torch.int64)
