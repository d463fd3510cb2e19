"""A token's choice by the upper planes of gate and up, as a student sees it while it learns."""

from __future__ import annotations

import torch

from sparse_kernels.formats import BFLOAT16, DecoderFormats, LayerFormats
from sparserve.calibration.factors import Aim, Tiers, by_upper_planes, first_thresholds
from sparserve.calibration.layers import FeedForward, feed_forward
from sparserve.compression.quantize import quantize_layer
from sparserve.healing.by_token import ByToken
from sparserve.healing.network import HealedLayer, Neurons
from sparserve.healing.stored import healed_tensors, layer_as_stored
from sparserve.model.effective import effective
from sparserve.model.loader import LoadedModel

# Tokens that thresholds are found on.
TOKENS = 64
TIERS = Tiers(noise=1.0)


class Planes(ByToken[tuple[FeedForward, torch.Tensor, float]]):
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
        super().__init__()
        self._model, self._formats = model, formats
        self._aim = Aim(neuron_bytes, (TIERS,), (reach,))

    def _used(self, layer: int, made: Neurons) -> torch.Tensor:
        first, activations = self._prompt_tokens, made.activations
        with torch.no_grad():
            tokens = made.inputs[:, first:].flatten(0, 1)
            mlp, factors, threshold = self._seen_of(layer, tokens)
            upper, noise = by_upper_planes(mlp, tokens)
            used = (upper.abs() * factors) >= threshold
            whole = used & (noise * factors >= threshold * TIERS.noise)
            shape = (*activations[:, first:].shape,)
            keeps = used.view(shape).to(activations.dtype)
            upper, whole = upper.view(shape), whole.view(shape)
            exact = activations[:, first:].detach()
            change = torch.where(whole, torch.zeros_like(exact), upper - exact) * keeps
        rest = activations[:, first:] * keeps + change  # its slope is that of the whole neuron
        return torch.cat((activations[:, :first], rest), dim=1)

    def _look_at(self, layer: int, inputs: torch.Tensor) -> tuple[FeedForward, torch.Tensor, float]:
        """-> (the layer as it is served, lengths of the columns of down, the threshold)."""
        served = self._served(layer, self._network.healed[layer]).to(inputs.device)
        mlp = served.to(inputs.dtype)
        # Of the type that they are multiplied with: products of two types are slow.
        factors = mlp.down.norm(dim=1)
        upper, noise = by_upper_planes(mlp, inputs[:: max(1, len(inputs) // TOKENS)])
        found = first_thresholds(upper.abs() * factors, noise * factors, self._aim)
        return mlp, factors, float(found)

    def _served(self, index: int, layer: HealedLayer) -> FeedForward:
        tensors = healed_tensors(layer_as_stored(self._model, index), layer)
        gate_up = self._formats.layer(index).gate_up
        formats = LayerFormats(BFLOAT16, gate_up, BFLOAT16)
        made = quantize_layer(tensors, formats, f"layer {index}: ")
        return feed_forward(made, effective(made), gate_up)
