"""How a request chooses the neurons that its decode steps read.

A `Policy` is what a request asks for. With the model's calibrated index, and after its prefill, it becomes a
`NeuronChoice`: what a forward reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sparse_kernels.choice import ChoiceKind, Score


class PolicyKind(Enum):
    DENSE = "dense"
    CORE = "core"
    TOKEN = "token"
    EXACT = "exact"
    AUTO = "auto"


class PredictorKind(Enum):
    """Where the core's scores come from."""

    STABILITY = (
        "stability"  # the prompt's own (CoreInfer, arXiv 2410.18311, with a score of any kind)
    )
    SIMILARITY = "similarity"  # those of the calibrated clusters that the prompt is near to
    AUTO = "auto"  # both, by rank


class DraftKind(Enum):
    """Who drafts what a dense pass verifies."""

    CORE = "core"
    TOKEN = "token"
    NGRAM = "ngram"  # what followed the last tokens before, in the prompt or in the output


@dataclass(frozen=True, slots=True)
class Policy:
    """A request's choice; None leaves it to the server."""

    kind: PolicyKind = PolicyKind.DENSE
    # Share of the feed-forward layers' bytes that a decoded token reads, (0, 1]. Of `core` it is also the
    # share of neurons.
    density: float | None = None
    target_kl: float | None = None  # mean KL to the dense model, nats per token, that is acceptable
    choice: ChoiceKind | None = None  # of `token`
    core_density: float | None = None  # of `token`: choose inside a core with this share of neurons
    predictor: PredictorKind = PredictorKind.AUTO
    score: Score = Score.NORM
    alpha: float | None = (
        None  # of count scores: the share of a token's activations that is counted
    )
    first_layer: int | None = (
        None  # of `core`: layers before it, and from `last_layer` on, stay dense
    )
    last_layer: int | None = None
    refresh_interval: int = 0  # decoded tokens between two dense passes over them; 0: none
    draft: DraftKind | None = None  # of `exact`
    draft_tokens: int | None = None


DENSE = Policy()
