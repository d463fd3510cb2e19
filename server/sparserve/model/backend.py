"""The one verb of every backend, `forward`, and what goes in and comes out.

Prompt prefill, decode, and later drafts' verification, refresh and prompt log-probabilities are all
a ragged batch of sequences with q_len >= 1 tokens each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch

from sparse_kernels._abi import SK_BLOCK_SIZE, SK_NUM_CANDIDATES
from sparse_kernels.choice import ALL_NEURONS, ChoiceKind, NeuronChoice, Score
from sparserve.model.config import ModelConfig
from sparserve.sparsity.statistics import NeuronStatistics

BLOCK_SIZE = SK_BLOCK_SIZE  # token positions in a KV block
NUM_CANDIDATES = SK_NUM_CANDIDATES


class Phase(Enum):
    """Which numerics a sequence's tokens take; KV of one is never recomputed by the other."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class SequenceInput:
    """One sequence's part of a batch.

    Tokens `token_ids` stand at positions `start`, `start + 1`, …; the KV of all earlier positions
    is in the blocks of `block_table`, which also has room for these. `output_offsets` are the
    indices into `token_ids` whose next-token distribution is wanted, `temperature` (> 0) the one
    at which `Candidates.log_normalizer` is taken.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    phase: Phase
    choice: NeuronChoice = ALL_NEURONS  # of decoded tokens
    output_offsets: Sequence[int] = ()
    temperature: float = 1.0
    # Candidates of those rows that a choice depends on, as few as may be known; 0: the whole rows.
    needed: int = 0
    collect_statistics: bool = False
    score: Score = Score.NORM  # of the statistics
    score_share: float = 1.0  # of a token's activations that a count counts
    # Tokens that follow the first of `token_ids`, whose log-probabilities are wanted, each with those of
    # the `num_top` likeliest tokens in its place.
    targets: Sequence[int] = ()
    num_top: int = 0


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    sequences: Sequence[SequenceInput]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The likeliest next tokens of each wanted row, in the order of the batch.

    Rows are sorted by (logit descending, id ascending). `full_logits(row)` -> [vocab] float32 is for
    the rare request whose choice may lie outside; it is valid until the next forward.
    """

    token_ids: torch.Tensor  # [rows, min(NUM_CANDIDATES, vocab)] int32 or int64
    logits: torch.Tensor  # same shape, float32
    # [rows] float32: logsumexp((logits of the whole row - its largest) / temperature). Relative to the
    # largest, or float32 would lose everything at small temperatures.
    log_normalizer: torch.Tensor
    log_normalizer_1: torch.Tensor  # [rows] float32: the same at temperature 1, for logprobs
    full_logits: Callable[[int], torch.Tensor]
    # [rows] how many of its candidates are known, and no normalizer or logits; 0: all of it. (): of all rows 0.
    known: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class TargetScores:
    """Log-probabilities, at temperature 1, of the targets of one sequence and of the likeliest tokens."""

    logprobs: torch.Tensor  # [targets] float32
    top_ids: torch.Tensor  # [targets, num_top] int64, by (logit descending, id ascending)
    top_logprobs: torch.Tensor  # same shape, float32


@dataclass(frozen=True, slots=True)
class HeadCounts:
    """Output rows of a forward by how the LM head with a scan computed them."""

    scanned: int = 0
    widened: int = 0  # whole, because too many tokens were near the best
    whole: int = 0  # because the forward's rows ask for it, or for too many candidates together
    rescored: int = 0  # logits that scanned rows got from the LM head itself


@dataclass(frozen=True, slots=True)
class NeuronReads:
    """Neurons of feed-forward layers that tokens looked at, used, read whole; see `reads` of sk_sequence."""

    counts: torch.Tensor  # [num_layers, 4] int64
    tokens: int  # that these are the sums over; 1 for a batch whose tokens read together


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    candidates: Candidates
    # Per sequence one for each KV block that its tokens touch, None where not asked for; position 0
    # (the attention sink) is left out.
    statistics: Sequence[Sequence[NeuronStatistics] | None]
    scores: Sequence[TargetScores | None]  # per sequence, None where it has no targets
    head: HeadCounts | None = None  # where the LM head has a scan
    # Per sequence, None where it uses all neurons; (): of all.
    reads: Sequence[NeuronReads | None] = ()
    union: NeuronReads | None = None  # of all sequences together, where one of them chooses


@dataclass(frozen=True, slots=True)
class BackendInfo:
    name: str
    device: str
    dtype: str
    threads: int
    # How tokens can choose among the neurons of a core; a core itself every backend can take.
    choices: frozenset[ChoiceKind]
    weight_bytes: (
        int  # read by a dense decode step: all but the embedding, of which it takes one row
    )
    mlp_bytes: int  # of these, by the feed-forward layers
    # Bytes of a neuron for each of NeuronReads' counts, by the kind of choice (None: a core); together they are
    # all of it. [num_layers, 4] float64.
    layer_neuron_bytes: Mapping[ChoiceKind | None, torch.Tensor]
    packed_bytes: int  # all weights as they lie in memory, padding included
    kv_dtype: str
    kv_bytes_per_token: int  # K and V of one position in all layers
    isa: str = ""  # level of the native kernels (`native.CpuFeatures.isa`), "" where there are none

    @property
    def title(self) -> str:
        return f"{self.name} ({self.isa})" if self.isa else self.name

    @property
    def place(self) -> str:
        """What computes, for people: a GPU, or threads."""
        return f"{self.threads} threads" if self.device == "cpu" else self.device

    @property
    def neuron_bytes(self) -> Mapping[ChoiceKind | None, tuple[float, ...]]:
        """See `mean_neuron_bytes`."""
        return {kind: mean_neuron_bytes(own) for kind, own in self.layer_neuron_bytes.items()}

    def read_bytes(self, kind: ChoiceKind | None, counts: torch.Tensor) -> float:
        """Of feed-forward weights, by NeuronReads' counts [num_layers, 4]."""
        return float((counts * self.layer_neuron_bytes[kind]).sum())


def mean_neuron_bytes(layers: torch.Tensor) -> tuple[float, ...]:
    """Of the mean layer, to plan with; [num_layers, 4] as in BackendInfo."""
    return tuple(layers.mean(dim=0).tolist())


class Backend(Protocol):
    """A model's weights and KV cache on some device. Not thread-safe: one thread calls it."""

    info: BackendInfo
    config: ModelConfig
    num_blocks: int

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        """Run the model over `batch`, writing KV. Deterministic: a sequence's output depends on its
        own tokens alone, never on its batch mates or on how its prompt was cut.
        """
        ...

    def read_blocks(self, block_ids: Sequence[int]) -> torch.Tensor:
        """A host copy of KV blocks, first dimension = block; opaque to the caller."""
        ...

    def write_blocks(self, block_ids: Sequence[int], blocks: torch.Tensor) -> None:
        """Put back what `read_blocks` returned, in blocks of other ids."""
        ...
