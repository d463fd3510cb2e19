"""What a token's choice goes by, and what stands in for the neurons left out: one walk through the layers
for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparse_kernels.choice import ChoiceKind
from sparse_kernels.formats import DecoderFormats
from sparse_kernels.weights import Correction
from sparserve.calibration.layers import walk
from sparserve.model.loader import LoadedModel

# Shares of the neurons whose thresholds are kept: 0, 1 / SHARES, …, 1.
SHARES = 512
# Numbers that thresholds are quantiles of, and tokens that they come from, at least.
IMPORTANCES, LEAST_TOKENS = 1 << 20, 256
# Tokens that a correction is fitted on, and how far it is drawn to zero, against the mean square of its inputs:
# a hidden size has as many unknowns for each output as there are tokens.
CORRECTION_TOKENS, RIDGE = 4096, 0.1

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Factors:
    """Of one kind of choice."""

    values: torch.Tensor  # float32 [layers, neurons]
    # float32 [layers, SHARES + 1]: neurons whose importance is not below number i are i / SHARES of all.
    thresholds: torch.Tensor

    def threshold(self, shares: torch.Tensor) -> torch.Tensor:
        """shares [layers] of the neurons, above 0 -> float32 [layers]."""
        place = (shares.double() * SHARES).clamp(1, SHARES)
        low = place.floor().long().clamp(max=SHARES - 1)
        values = self.thresholds.double().gather(1, torch.stack((low, low + 1), dim=1))
        return torch.lerp(values[:, 0], values[:, 1], place - low).float()


def fit_factors(
    model: LoadedModel, formats: DecoderFormats, token_ids: torch.Tensor, on_layer: Progress
) -> dict[ChoiceKind, Factors]:
    """token_ids [windows, tokens]. A neuron's factor is the length of its column of down, that of a gate's
    times the mean |up| of these tokens, which the gate alone does not know."""
    found: dict[ChoiceKind, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for index, (mlp, inputs) in enumerate(walk(model, formats, token_ids)):
        neurons = len(mlp.gate)
        x = _some_tokens(inputs, max(LEAST_TOKENS, IMPORTANCES // neurons))
        lengths = mlp.down.norm(dim=1)
        gate, up = F.silu(x @ mlp.gate.T), x @ mlp.up.T
        expected = up.abs().mean(dim=0) * lengths
        layer = {ChoiceKind.GATE: (expected, gate.abs() * expected)}
        if mlp.upper_gate is not None:
            layer[ChoiceKind.PLANES] = (lengths, mlp.approximate(x).abs() * lengths)
        for kind, (factors, importance) in layer.items():
            found.setdefault(kind, []).append((factors, _thresholds(importance)))
        on_layer(index + 1, model.config.num_layers)
    return {
        kind: Factors(*(torch.stack(own) for own in zip(*layers, strict=True)))
        for kind, layers in found.items()
    }


def _some_tokens(inputs: torch.Tensor, count: int) -> torch.Tensor:
    """inputs [windows, tokens, hidden] -> [count at most, hidden], evenly spread; without position 0, whose
    activations are of their own kind."""
    flat = inputs[:, 1:].flatten(0, 1)
    return flat[:: max(1, -(-len(flat) // count))]


def _thresholds(importance: torch.Tensor) -> torch.Tensor:
    """[SHARES + 1] float32; see Factors."""
    falling = importance.flatten().sort(descending=True).values
    places = (torch.arange(1, SHARES) * len(falling) / SHARES).round().long().clamp(min=1) - 1
    ends = torch.tensor([float("inf")]), torch.zeros(1)
    return torch.cat((ends[0], falling[places], ends[1]))


@dataclass(frozen=True, slots=True)
class LayerTokens:
    """What a layer's feed-forward makes of some tokens."""

    windows: torch.Tensor  # int64 [tokens], which window each is of
    gate: torch.Tensor  # silu(gate), [tokens, neurons]
    activations: torch.Tensor  # the same shape
    approximate: torch.Tensor | None  # by the upper planes, where there are planes


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
        approximate = None if mlp.upper_gate is None else mlp.approximate(x)
        gate = F.silu(x @ mlp.gate.T)
        tokens = LayerTokens(of, gate, gate * (x @ mlp.up.T), approximate)
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
