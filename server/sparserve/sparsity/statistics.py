"""Neuron statistics of a prompt, gathered while it is prefilled.

The norm score of GRIFFIN (arXiv 2402.19427): with a_t = silu(gate_t) * up_t the input of the down
projection at token t, a neuron's score is sum_t (a_tn / |a_t|_2)^2.

Or a count: how often a neuron was among the strongest of a token (CoreInfer, arXiv 2410.18311).

Sums are kept as integers in units of 2^-32: integer addition is exact, so a block's sums do not
depend on how the prompt was cut into chunks, batched, preempted or resumed. A whole block is rounded
to fp16 once, which is how the prefix cache keeps it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparse_kernels.choice import Score

UNIT = 2.0**-32


@dataclass(slots=True)
class NeuronStatistics:
    """Norm-score sums over some tokens of one sequence; add with `+=`."""

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


class PromptStatistics:
    """Statistics of one prompt, block by block, from its beginning on; of the tokens after it too, where they
    are added.

    Each block's sums are rounded to fp16, those in a prompt's last, unfinished block too: blocks just
    computed and blocks from the prefix cache add up to the same.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._whole: list[torch.Tensor] = []  # [num_layers, intermediate] fp16 each
        self._sum: torch.Tensor | None = None  # of them, [num_layers, intermediate] int64
        self._open: NeuronStatistics | None = None  # of the block that `extend` may go on with
        self._tokens = 0

    def fork(self) -> PromptStatistics:
        """Equal ones, which go on by themselves."""
        other = copy.copy(self)
        other._whole, other._open = list(self._whole), copy.copy(self._open)
        return other

    def append_block(self, rounded: torch.Tensor) -> None:
        """The next block, [num_layers, intermediate] fp16, as `block` returned it."""
        assert self._open is None, "cached blocks come before computed ones"
        # The first token of a prompt, the attention sink, counts nowhere.
        self._tokens += self._block_size - (0 if self._whole else 1)
        self._add(rounded)

    def extend(self, start: int, parts: Sequence[NeuronStatistics]) -> None:
        """Tokens from position `start` on: one part for each block that they touch."""
        for index, part in enumerate(parts):
            if index > 0 or start % self._block_size == 0:
                self._close()
            if self._open is None:
                self._open = part
            else:
                self._open += part
            self._tokens += part.tokens

    def block(self, index: int) -> torch.Tensor:
        """Block `index`, all of whose tokens are in: [num_layers, intermediate] fp16."""
        if index == len(self._whole):
            assert self._open is not None
            return _rounded(self._open)
        return self._whole[index]

    def total(self) -> NeuronStatistics | None:
        """Over the whole prompt; None before its first token."""
        total = self._sum
        if self._open is not None:
            last = _in_units(_rounded(self._open))
            total = last if total is None else total + last
        return None if total is None else NeuronStatistics(total, self._tokens)

    def first_half(self) -> NeuronStatistics | None:
        """Over the first half of its blocks, rounded down; None where that is none."""
        half = self._whole[: (len(self._whole) + (self._open is not None)) // 2]
        if not half:
            return None
        total = torch.stack([_in_units(rounded) for rounded in half]).sum(dim=0)
        return NeuronStatistics(total, len(half) * self._block_size - 1)

    def _close(self) -> None:
        if self._open is not None:
            self._add(_rounded(self._open))
            self._open = None

    def _add(self, rounded: torch.Tensor) -> None:
        self._whole.append(rounded)
        units = _in_units(rounded)
        self._sum = units if self._sum is None else self._sum + units


def _rounded(statistics: NeuronStatistics) -> torch.Tensor:
    return statistics.scores().half()


def _in_units(rounded: torch.Tensor) -> torch.Tensor:
    # fp16 numbers are multiples of 2^-24, so UNIT holds them exactly.
    return (rounded.double() / UNIT).to(torch.int64)


def neuron_scores(activations: torch.Tensor, score: Score, share: float) -> torch.Tensor:
    """Score of each token and neuron, `activations` [tokens, intermediate] -> int64 of that shape, in units of
    UNIT; see sk_score. Raises nothing; inputs are finite.
    """
    if score is Score.NORM:
        return norm_score(activations)
    ranked = activations if score is Score.SIGNED_COUNT else activations.abs()
    eligible = (activations > 0).sum(dim=1) if score is Score.SIGNED_COUNT else None
    neurons = activations.shape[1]
    of = torch.full((len(activations),), neurons) if eligible is None else eligible
    counted = (of.double() * torch.tensor(share, dtype=torch.float32)).ceil().long()
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    counts = torch.zeros(activations.shape, dtype=torch.int64)
    first = (torch.arange(neurons) < counted[:, None]).long()
    return counts.scatter_(1, order, first << 32)


def norm_score(activations: torch.Tensor) -> torch.Tensor:
    """Score of each token and neuron, `activations` [tokens, intermediate] -> int64 of that shape.

    A token whose activations are all zero scores zero. Raises nothing; inputs are finite.
    """
    squares = activations.double().square()  # of any float32 in range, none lost to zero
    total = squares.sum(dim=1, keepdim=True)
    units = 1 / UNIT / total.where(total > 0, 1.0)
    return (squares * units).round().to(torch.int64)
