"""What a token's choice goes by, and what stands in for the neurons left out: one walk through the layers
for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparse_kernels.choice import ChoiceKind
from sparse_kernels.formats import DecoderFormats
from sparse_kernels.weights import Correction
from sparserve.calibration.layers import FeedForward, walk
from sparserve.model.loader import LoadedModel

# Numbers that thresholds are quantiles of, and tokens that they come from, at least.
IMPORTANCES, LEAST_TOKENS = 1 << 19, 256
BISECTIONS = 40
# Tokens that a correction is fitted on, and how far it is drawn to zero, against the mean square of its inputs:
# a hidden size has as many unknowns for each output as there are tokens.
CORRECTION_TOKENS, RIDGE = 4096, 0.1

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Tiers:
    """What the thresholds of a layer are to its first one, see SK_CHOICE_PLANES."""

    noise: float = 0.0  # of the noise from which gate and up are read whole
    down: float = 0.0  # of the importance from which down is, where it is in planes

    def of(self, thresholds: torch.Tensor) -> torch.Tensor:
        """First thresholds [layers] -> [layers, 3]."""
        return thresholds[:, None] * torch.tensor([1.0, self.noise, self.down])


@dataclass(frozen=True, slots=True)
class Aim:
    """What a choice by token is to read of each layer."""

    neuron_bytes: Sequence[float]  # see BackendInfo
    tiers: Sequence[Tiers]
    reaches: Sequence[float]  # of what is left of a neuron's bytes once it was looked at


@dataclass(frozen=True, slots=True)
class Factors:
    """Of one kind of choice."""

    values: torch.Tensor  # float32 [layers, neurons]
    thresholds: torch.Tensor  # float32 [layers, tiers, reaches], the first of each layer


def fit_factors(
    model: LoadedModel,
    formats: DecoderFormats,
    token_ids: torch.Tensor,
    aims: Mapping[ChoiceKind, Aim],
    on_layer: Progress,
) -> dict[ChoiceKind, Factors]:
    """token_ids [windows, tokens]. A neuron's factor is the length of its column of down, that of a gate's
    times the mean |up| of these tokens, which the gate alone does not know. Every layer gets the same share
    of the bytes: budgets by layer were measured to gain nothing where tokens choose.
    """
    found: dict[ChoiceKind, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for index, (mlp, inputs) in enumerate(walk(model, formats, token_ids)):
        x = _some_tokens(inputs, max(LEAST_TOKENS, IMPORTANCES // len(mlp.gate)))
        for kind, aim in aims.items():
            make = _by_gate if kind is ChoiceKind.GATE else by_planes
            factors, importance, noise = make(mlp, x)
            thresholds = first_thresholds(importance, noise, aim)
            found.setdefault(kind, []).append((factors, thresholds))
        on_layer(index + 1, model.config.num_layers)
    widest = model.config.intermediate_size
    return {
        kind: Factors(
            torch.stack([F.pad(own, (0, widest - len(own))) for own, _ in layers]),
            torch.stack([own for _, own in layers]),
        )
        for kind, layers in found.items()
    }


Importance = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _by_gate(mlp: FeedForward, x: torch.Tensor) -> Importance:
    """-> (factors [neurons], importance [tokens, neurons], its noise, if it has any)."""
    factors = (x @ mlp.up.T).abs().mean(dim=0) * mlp.down.norm(dim=1)
    return factors, F.silu(x @ mlp.gate.T).abs() * factors, None


def by_planes(mlp: FeedForward, x: torch.Tensor) -> Importance:
    """The same; the noise as SK_CHOICE_PLANES says."""
    activations, noise = by_upper_planes(mlp, x)
    factors = mlp.down.norm(dim=1)
    return factors, activations.abs() * factors, noise * factors


def by_upper_planes(mlp: FeedForward, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (activations as the upper planes of gate and up tell them, how far off they are), [tokens, neurons] each."""
    assert mlp.upper is not None
    (gate, gate_variance), (up, up_variance) = (plane.products(x) for plane in mlp.upper)
    sigmoid, silu = gate.sigmoid(), F.silu(gate)
    slope = (sigmoid * (1 + gate * (1 - sigmoid))).square()
    variance = (
        slope * up.square() * gate_variance
        + silu.square() * up_variance
        + slope * gate_variance * up_variance
    )
    return silu * up, variance.sqrt()


def first_thresholds(
    importance: torch.Tensor, noise: torch.Tensor | None, aim: Aim
) -> torch.Tensor:
    """float32 [tiers, reaches]. Each share read is one of numbers not below the first threshold, so that
    sorting them once is enough for every threshold."""
    used = importance.flatten().sort().values
    most = float(used[-1])
    rows = []
    for tiers in aim.tiers:
        whole = used
        if noise is not None and tiers.noise > 0:
            least = torch.minimum(importance, noise / tiers.noise)
            whole = least.flatten().sort().values
        reads = _Reads((used, whole, used / max(1.0, tiers.down)), aim.neuron_bytes[1:])
        rows.append([_bisected(reads, reach, most) for reach in aim.reaches])
    return torch.tensor(rows)


@dataclass(frozen=True, slots=True)
class _Reads:
    """Of what is left once a neuron was looked at, the share that is read with a first threshold."""

    rising: Sequence[
        torch.Tensor
    ]  # sorted; a part is read where its number is not below the threshold
    parts: Sequence[float]  # bytes

    def __call__(self, threshold: float) -> float:
        shares = (1 - float(torch.searchsorted(own, threshold)) / len(own) for own in self.rising)
        read = sum(part * share for part, share in zip(self.parts, shares, strict=True))
        return read / sum(self.parts)


def _bisected(reads: Callable[[float], float], reach: float, most: float) -> float:
    """The threshold, of up to `most`, at which `reads` falls to `reach`; on a logarithmic scale."""
    low, high = math.log(most + 1e-30) - 30, math.log(most + 1e-30)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if reads(math.exp(middle)) > reach else (low, middle)
    return math.exp(high)


def _some_tokens(inputs: torch.Tensor, count: int) -> torch.Tensor:
    """inputs [windows, tokens, hidden] -> [count at most, hidden], evenly spread; without position 0, whose
    activations are of their own kind."""
    flat = inputs[:, 1:].flatten(0, 1)
    return flat[:: max(1, -(-len(flat) // count))]


@dataclass(frozen=True, slots=True)
class LayerTokens:
    """What a layer's feed-forward makes of some tokens."""

    windows: torch.Tensor  # int64 [tokens], which window each is of
    gate: torch.Tensor  # silu(gate), [tokens, neurons]
    activations: torch.Tensor  # the same shape


# (layer, its tokens) -> the activations that a choice uses, [tokens, neurons].
Used = Callable[[int, LayerTokens], torch.Tensor]


def fit_corrections(
    model: LoadedModel,
    formats: DecoderFormats,
    token_ids: torch.Tensor,
    choices: Sequence[Used],
    rank: int,
    on_layer: Progress,
) -> list[list[Correction]]:
    """One for each of `choices`, one pair for each layer: of all maps of that rank the one that comes closest
    to what the choice leaves out of the layer's output, with a ridge.

    Reduced-rank regression (Izenman 1975): the least-squares map B, then its outputs' `rank` main directions
    V: inputs (B V)^T, outputs V^T.
    """
    found: list[list[Correction]] = [[] for _ in choices]
    for index, (mlp, inputs) in enumerate(walk(model, formats, token_ids)):
        windows = torch.arange(len(inputs))[:, None, None].expand(*inputs.shape[:2], 1)
        x = _some_tokens(inputs, CORRECTION_TOKENS)
        of = _some_tokens(windows, CORRECTION_TOKENS).flatten()
        square = (x.T @ x).double()
        ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
        factor = torch.linalg.cholesky(square + ridge)
        gate = F.silu(x @ mlp.gate.T)
        tokens = LayerTokens(of, gate, gate * (x @ mlp.up.T))
        for used, own in zip(choices, found, strict=True):
            dropped = (tokens.activations - used(index, tokens)) @ mlp.down
            product = (x.T @ dropped).double()
            full = torch.cholesky_solve(product, factor)
            _, directions = torch.linalg.eigh(full.T @ (square + ridge) @ full)
            kept = directions[:, -rank:]
            pair = ((full @ kept).T, kept.T)
            own.append((pair[0].bfloat16().contiguous(), pair[1].bfloat16().contiguous()))
        on_layer(index + 1, model.config.num_layers)
    return found
