"""A token's choice by the upper planes of gate and up, as a student sees it while it learns."""

from __future__ import annotations

import random

import torch

from sparse_kernels.formats import BFLOAT16, DecoderFormats, LayerFormats
from sparserve.calibration.factors import Aim, Tiers, by_upper_planes, first_thresholds
from sparserve.calibration.layers import FeedForward, feed_forward
from sparserve.compression.quantize import quantize_layer
from sparserve.healing.network import HealedLayer, Network
from sparserve.healing.stored import healed_tensors, layer_as_stored
from sparserve.healing.through import Through
from sparserve.model.effective import effective
from sparserve.model.loader import LoadedModel

# Forward passes that see the same planes and thresholds, while the weights go on learning.
PASSES = 8
# Tokens that thresholds are found on.
TOKENS = 64
TIERS = Tiers(noise=1.0)


class Planes(Through):
    """SK_CHOICE_PLANES: neurons that matter by their upper planes are used, those of them that the lower ones may
    change much are read whole. Thresholds are those at which the share of bytes is read."""

    def __init__(
        self,
        model: LoadedModel,
        formats: DecoderFormats,
        neuron_bytes: tuple[float, ...],
        reach: float,
    ) -> None:
        """`formats`: those that `model` will be served in; `reach`: of a neuron's bytes what is read once it was
        looked at."""
        self._model, self._formats = model, formats
        self._aim = Aim(neuron_bytes, (TIERS,), (reach,))
        self._passes = 0
        self._seen: dict[int, tuple[FeedForward, torch.Tensor, float]] = {}

    def attach(self, network: Network) -> None:
        self._network = network

    def renew(self) -> None:
        self._passes = 0

    def begin(self, prompt_tokens: int, *, watch: bool) -> None:
        super().begin(prompt_tokens, watch=watch)
        if self._passes % PASSES == 0:
            self._seen.clear()
        self._passes += 1

    def prompt_tokens(self, window: int, source: random.Random | None) -> int:
        return 1  # whose activations are of their own kind: an attention sink

    def _used(self, layer: int, inputs: torch.Tensor, activations: torch.Tensor) -> torch.Tensor:
        first = self._prompt_tokens
        with torch.no_grad():
            tokens = inputs[:, first:].flatten(0, 1).float()
            mlp, factors, threshold = self._found(layer, tokens)
            upper, noise = by_upper_planes(mlp, tokens)
            used = (upper.abs() * factors) >= threshold
            whole = used & (noise * factors >= threshold * TIERS.noise)
            shape = (*activations[:, first:].shape,)
            keeps = used.view(shape).to(activations.dtype)
            upper, whole = upper.view(shape).to(activations.dtype), whole.view(shape)
            exact = activations[:, first:].detach()
            change = torch.where(whole, torch.zeros_like(exact), upper - exact) * keeps
        rest = activations[:, first:] * keeps + change  # its slope is that of the whole neuron
        return torch.cat((activations[:, :first], rest), dim=1)

    def _found(self, layer: int, tokens: torch.Tensor) -> tuple[FeedForward, torch.Tensor, float]:
        """-> (the layer as it is served, lengths of the columns of down, the threshold)."""
        if layer not in self._seen:
            mlp = self._served(layer, self._network.healed[layer]).to(tokens.device)
            factors = mlp.down.norm(dim=1)
            upper, noise = by_upper_planes(mlp, tokens[:: max(1, len(tokens) // TOKENS)])
            found = first_thresholds(upper.abs() * factors, noise * factors, self._aim)
            self._seen[layer] = mlp, factors, float(found)
        return self._seen[layer]

    def _served(self, index: int, layer: HealedLayer) -> FeedForward:
        tensors = healed_tensors(layer_as_stored(self._model, index), layer)
        gate_up = self._formats.layer(index).gate_up
        formats = LayerFormats(BFLOAT16, gate_up, BFLOAT16)
        made = quantize_layer(tensors, formats, f"layer {index}: ")
        return feed_forward(made, effective(made), gate_up)
