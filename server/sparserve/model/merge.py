"""The outputs of several calls as those of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from sparserve.model.backend import (
    Candidates,
    ForwardOutput,
    HeadCounts,
    NeuronReads,
    SequenceInput,
)


@dataclass(frozen=True, slots=True)
class Call:
    """Some sequences of a batch, by their places in it, that are computed together."""

    places: Sequence[int]
    prompts: bool  # as `Decoder.forward` takes it
    union: bool  # whether it tells what they read together


def kept(output: ForwardOutput) -> ForwardOutput:
    """With logits of its own: the next call overwrites the library's."""
    candidates = output.candidates
    logits = [candidates.full_logits(row).clone() for row in range(len(candidates.logits))]
    return replace(output, candidates=replace(candidates, full_logits=logits.__getitem__))


def merged(
    sequences: Sequence[SequenceInput], calls: Sequence[Call], outputs: Sequence[ForwardOutput]
) -> ForwardOutput:
    """In the order of the batch; every output but the last is `kept`."""
    where = {}  # place in the batch -> (call, place in the call, first row there)
    for number, call in enumerate(calls):
        row = 0
        for own, place in enumerate(call.places):
            where[place] = number, own, row
            row += len(sequences[place].output_offsets)
    found = [where[place] for place in range(len(sequences))]
    rows = [
        (number, first + i)
        for (number, _, first), sequence in zip(found, sequences, strict=True)
        for i in range(len(sequence.output_offsets))
    ]
    reads = [
        outputs[number].reads[own] if outputs[number].reads else None for number, own, _ in found
    ]
    unions = [output.union for output in outputs if output.union is not None]
    return ForwardOutput(
        _candidates(rows, [output.candidates for output in outputs]),
        [outputs[number].statistics[own] for number, own, _ in found],
        [outputs[number].scores[own] for number, own, _ in found],
        _head_counts([output.head for output in outputs if output.head is not None]),
        reads if any(part is not None for part in reads) else (),
        _union(unions) if unions else None,
    )


def _candidates(rows: Sequence[tuple[int, int]], parts: Sequence[Candidates]) -> Candidates:
    """`rows`: (call, row in it) of each row of the batch."""
    begins = [0]
    for part in parts:
        begins.append(begins[-1] + len(part.logits))
    order = torch.tensor([begins[number] + row for number, row in rows], dtype=torch.long)

    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in parts])[order]

    known = [part.known or [0] * len(part.logits) for part in parts]
    return Candidates(
        token_ids=joined("token_ids"),
        logits=joined("logits"),
        log_normalizer=joined("log_normalizer"),
        log_normalizer_1=joined("log_normalizer_1"),
        full_logits=lambda row: parts[rows[row][0]].full_logits(rows[row][1]),
        known=[known[n][row] for n, row in rows] if any(p.known for p in parts) else (),
    )


def _head_counts(parts: Sequence[HeadCounts]) -> HeadCounts | None:
    if not parts:
        return None
    return HeadCounts(*(sum(getattr(p, f.name) for p in parts) for f in fields(HeadCounts)))


def _union(parts: Sequence[NeuronReads]) -> NeuronReads:
    """Calls read one after another, so their neurons add up."""
    counts = torch.stack([part.counts for part in parts]).sum(dim=0)
    return NeuronReads(counts, sum(part.tokens for part in parts))
