"""What decoded tokens read of the weights, counted at the backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sparse_kernels.choice import ChoiceKind, NeuronChoice
from sparserve.engine.engine import Engine
from sparserve.model.backend import (
    Backend,
    BackendInfo,
    ForwardBatch,
    ForwardOutput,
    NeuronReads,
    Phase,
    SequenceInput,
)
from sparserve.sparsity.chooser import ChoicePlan
from sparserve.sparsity.policy import DENSE

DENSE_PLAN = ChoicePlan(DENSE, 1.0)


def read_bytes(info: BackendInfo, kind: ChoiceKind | None, reads: NeuronReads) -> float:
    """Of feed-forward weights, over all tokens of `reads`."""
    return info.read_bytes(kind, reads.counts)


def correction_bytes(plan: ChoicePlan, choice: NeuronChoice) -> int:
    """Of what stands in for the neurons left out, in all layers."""
    index = (plan.drafts or plan).index
    return 0 if index is None else index.correction_bytes(choice.correction)


@dataclass(frozen=True, slots=True)
class Reads:
    """Of a batch of sequences while they decode."""

    weight_bytes: float  # read together for one new token
    passes: float  # over a sequence's KV for one new token of it; below 1 where drafts are accepted
    density: float  # share of the feed-forward layers' bytes that one new token took of its own
    union: float  # share of them that a step read for all sequences, mean


@dataclass(frozen=True, slots=True)
class _Step:
    parts: Sequence[tuple[SequenceInput, NeuronReads | None]]  # of sequences that decode
    union: NeuronReads | None


class Watch:
    """A backend that remembers what its steps of decoded tokens read."""

    def __init__(self, backend: Backend) -> None:
        self.info, self.config, self.num_blocks = backend.info, backend.config, backend.num_blocks
        self._backend = backend
        self._steps: list[_Step] = []

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        output = self._backend.forward(batch)
        reads = output.reads or [None] * len(batch.sequences)
        parts = [
            (sequence, read)
            for sequence, read in zip(batch.sequences, reads, strict=True)
            if sequence.phase is Phase.DECODE
        ]
        if parts:
            self._steps.append(_Step(parts, output.union))
        return output

    def read_blocks(self, block_ids: Sequence[int]) -> torch.Tensor:
        return self._backend.read_blocks(block_ids)

    def write_blocks(self, block_ids: Sequence[int], blocks: torch.Tensor) -> None:
        self._backend.write_blocks(block_ids, blocks)

    def found(self, plan: ChoicePlan, new_tokens: int) -> Reads:
        """`new_tokens` came out of the steps, by `plan`."""
        dense = self.info.mlp_bytes
        union = alone = 0.0
        for step in self._steps:
            choosing = [sequence.choice for sequence, reads in step.parts if reads is not None]
            if step.union is None or not choosing:
                union += dense
            else:
                union += read_bytes(self.info, choosing[0].kind, step.union)
                union += correction_bytes(plan, choosing[0])
            for sequence, reads in step.parts:
                if reads is None:
                    alone += dense
                else:
                    alone += read_bytes(self.info, sequence.choice.kind, reads)
                    alone += len(sequence.token_ids) * correction_bytes(plan, sequence.choice)
        passes = sum(len(step.parts) for step in self._steps)
        # A batch of many tokens that choose is computed in several calls, each of which reads the rest.
        calls = sum(1 if step.union is None else step.union.tokens for step in self._steps)
        others = calls * (self.info.weight_bytes - dense)
        return Reads(
            weight_bytes=(others + union) / new_tokens,
            passes=passes / new_tokens,
            density=alone / (new_tokens * dense),
            union=union / (len(self._steps) * dense),
        )


@contextmanager
def watching(engine: Engine) -> Iterator[Watch]:
    """`engine` runs on a Watch meanwhile."""
    backend = engine.backend
    watch = Watch(backend)
    engine.backend = watch
    try:
        yield watch
    finally:
        engine.backend = backend
