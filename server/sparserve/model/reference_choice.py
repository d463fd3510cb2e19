"""Choices of neurons in plain torch: what `sk_choice` means, for the reference backend."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sparse_kernels.choice import ChoiceKind, NeuronChoice
from sparse_kernels.weights import ChoiceTensors
from sparserve.model.backend import NeuronReads, Phase, SequenceInput


@dataclass(slots=True)
class LayerUnion:
    """Neurons of one layer that any token of a forward looked at, used; bool [intermediate] each."""

    looked: torch.Tensor
    used: torch.Tensor

    def counts(self) -> torch.Tensor:
        used = self.used.sum()
        return torch.stack((self.looked.sum(), used, used, used))


@dataclass(slots=True)
class Choosing:
    """The choices of one forward: applies them and counts what is read."""

    tensors: ChoiceTensors
    layers: int
    reads: list[NeuronReads | None] = field(default_factory=list)
    union: torch.Tensor | None = None  # [layers, 4]

    @classmethod
    def of(cls, tensors: ChoiceTensors, layers: int, batch: list[SequenceInput]) -> Choosing:
        reads = [
            NeuronReads(torch.zeros(layers, 4, dtype=torch.int64), len(s.token_ids))
            if s.phase is Phase.DECODE and not s.choice.is_dense
            else None
            for s in batch
        ]
        chooses = any(own is not None for own in reads)
        union = torch.zeros(layers, 4, dtype=torch.int64) if chooses else None
        return cls(tensors, layers, reads, union)

    def used(
        self,
        layer: int,
        choice: NeuronChoice,
        reads: NeuronReads,
        gate: torch.Tensor,
        union: LayerUnion,
    ) -> torch.Tensor:
        """silu(gate) [tokens, intermediate] -> which of them are used, bool of that shape."""
        neurons = gate.shape[1]
        core = choice.members(neurons)
        looked = torch.ones(neurons, dtype=torch.bool) if core is None else core[layer]
        used = looked.expand_as(gate)
        if choice.kind is not None:
            if choice.kind is not ChoiceKind.GATE or self.tensors.gate_factors is None:
                raise ValueError(f"the reference backend cannot choose by {choice.kind.value}")
            assert choice.thresholds is not None
            importance = gate.abs() * self.tensors.gate_factors[layer, :neurons]
            used = used & ~(importance < choice.thresholds[layer, 0])
        count = used.sum()
        reads.counts[layer] += torch.stack((looked.sum() * len(gate), count, count, count))
        union.looked |= looked
        union.used |= used.any(dim=0)
        return used

    def corrected(
        self, layer: int, choice: NeuronChoice, normed: torch.Tensor
    ) -> torch.Tensor | None:
        """What stands in for the neurons left out: normed [tokens, hidden] -> that shape; None: nothing."""
        if not choice.correction:
            return None
        inputs, outputs = self.tensors.corrections[choice.correction - 1][layer]
        return (normed @ inputs.float().T) @ outputs.float()
