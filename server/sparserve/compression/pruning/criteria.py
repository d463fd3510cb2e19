"""How much each head and neuron matters, one function a criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from sparserve.compression.pruning.statistics import LayerStatistics


@dataclass(frozen=True, slots=True, eq=False)
class LayerMatrices:
    """float32, as in LayerWeights."""

    wq: torch.Tensor  # [num_heads * head_dim, hidden]
    wo: torch.Tensor  # [hidden, num_heads * head_dim]
    w_gate: torch.Tensor  # [neurons, hidden]
    w_up: torch.Tensor  # [neurons, hidden]
    w_down: torch.Tensor  # [hidden, neurons]


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """Larger matters more; heads and neurons have scales of their own."""

    heads: torch.Tensor  # float64 [num_heads]
    neurons: torch.Tensor  # float64 [neurons]


Criterion = Callable[[LayerMatrices, LayerStatistics, torch.Generator], Importance]


def amp(layer: LayerMatrices, seen: LayerStatistics, _: torch.Generator) -> Importance:
    """As published (arXiv 2504.21174): a head's output through o_proj, |W_o z|_1; of a neuron E|a| alone."""
    return Importance(seen.mean_head_outputs, seen.neurons.mean_absolute)


def amp_w(layer: LayerMatrices, seen: LayerStatistics, _: torch.Generator) -> Importance:
    """AMP with the heads' formula for neurons too: E|a| |W_down|_1."""
    reach = layer.w_down.double().abs().sum(dim=0)
    return Importance(seen.mean_head_outputs, seen.neurons.mean_absolute * reach)


def wanda(layer: LayerMatrices, seen: LayerStatistics, _: torch.Generator) -> Importance:
    """Wanda (arXiv 2306.11695) summed over what is removed together: mean |W_ij| sqrt(E x_j^2) of the columns."""

    def columns(weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        return weight.double().abs().mean(dim=0) * squares.sqrt()

    heads = columns(layer.wo, seen.heads.mean_square)
    return Importance(
        _by_head(heads, seen).mean(dim=1), columns(layer.w_down, seen.neurons.mean_square)
    )


def flap(layer: LayerMatrices, seen: LayerStatistics, _: torch.Generator) -> Importance:
    """FLAP (arXiv 2312.11983): Var(x_j) |W_j|_2^2 of a column; of a head the mean of their squares."""

    def columns(weight: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        return variance * weight.double().square().sum(dim=0)

    heads = columns(layer.wo, seen.heads.variance)
    return Importance(
        _by_head(heads, seen).square().mean(dim=1),
        columns(layer.w_down, seen.neurons.variance),
    )


def magnitude(layer: LayerMatrices, seen: LayerStatistics, _: torch.Generator) -> Importance:
    """The weights alone: |W_q|_2 |W_o|_2 of a head, |gate|_2 |up|_2 |down|_2 of a neuron."""
    heads = len(seen.head_outputs)
    into = layer.wq.double().view(heads, -1).norm(dim=1)
    out = _by_head(layer.wo.double().square().sum(dim=0), seen).sum(dim=1).sqrt()
    gate, up = layer.w_gate.double().norm(dim=1), layer.w_up.double().norm(dim=1)
    return Importance(into * out, gate * up * layer.w_down.double().norm(dim=0))


def random(layer: LayerMatrices, seen: LayerStatistics, generator: torch.Generator) -> Importance:
    """What any other must beat."""
    heads, neurons = len(seen.head_outputs), layer.w_down.shape[1]
    both = torch.rand(heads + neurons, generator=generator, dtype=torch.float64)
    return Importance(both[:heads], both[heads:])


CRITERIA: Mapping[str, Criterion] = {
    "amp": amp,
    "amp_w": amp_w,
    "wanda": wanda,
    "flap": flap,
    "magnitude": magnitude,
    "random": random,
}


def _by_head(columns: torch.Tensor, seen: LayerStatistics) -> torch.Tensor:
    return columns.view(len(seen.head_outputs), -1)
