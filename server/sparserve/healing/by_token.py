"""Choices that each token makes for itself, as a student sees them while it learns."""

from __future__ import annotations

import random
from abc import abstractmethod
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F

from sparserve.calibration.factors import Aim, Tiers, first_thresholds
from sparserve.healing.network import DTYPE, Network, Neurons
from sparserve.healing.through import Through

# Forward passes that see the same thresholds, while the weights go on learning.
PASSES = 8

Seen = TypeVar("Seen")


class ByToken(Through, Generic[Seen]):
    """Thresholds, and what else is worked out of a layer's weights for several passes: `Seen`."""

    def __init__(self) -> None:
        self._passes = 0
        self._seen: dict[int, Seen] = {}

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

    def _seen_of(self, layer: int, inputs: torch.Tensor) -> Seen:
        """inputs [tokens, hidden] after the prompt, in DTYPE."""
        if layer not in self._seen:
            self._seen[layer] = self._look_at(layer, inputs)
        return self._seen[layer]

    @abstractmethod
    def _look_at(self, layer: int, inputs: torch.Tensor) -> Seen: ...


class Gates(ByToken[tuple[torch.Tensor, float]]):
    """SK_CHOICE_GATE: neurons are used whose gate, times a factor of each, reaches a threshold: that at which the share
    of bytes is read."""

    def __init__(self, neuron_bytes: tuple[float, ...], reach: float) -> None:
        """`reach`: of a neuron's bytes what is read once its gate was."""
        super().__init__()
        self._aim = Aim(neuron_bytes, (Tiers(),), (reach,))

    def _used(self, layer: int, made: Neurons) -> torch.Tensor:
        first = self._prompt_tokens
        with torch.no_grad():
            gates = made.gates[:, first:]
            factors, threshold = self._seen_of(layer, made.inputs[:, first:].flatten(0, 1))
            keeps = torch.ones_like(made.gates)
            keeps[:, first:] = (gates.abs() * factors) >= threshold
        return made.activations * keeps

    def _look_at(self, layer: int, inputs: torch.Tensor) -> tuple[torch.Tensor, float]:
        """-> (factors [neurons], the threshold)"""
        inputs = inputs.float()
        healed = self._network.healed[layer]
        gate, up = healed.gate_up.merged().chunk(2)
        up_sizes = (inputs @ up.T).abs().mean(dim=0) * healed.log_gains.exp()
        factors = up_sizes * healed.down.merged().norm(dim=0)
        importance = F.silu(inputs @ gate.T).abs() * factors
        return factors.to(DTYPE), float(first_thresholds(importance, None, self._aim))
