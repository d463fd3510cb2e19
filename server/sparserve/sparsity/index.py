"""What `sparserve calibrate` measured of one model in one format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparse_kernels.choice import ChoiceKind
from sparse_kernels.weights import ChoiceTensors, Correction
from sparserve.sparsity.policy import PolicyKind


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """One way to choose, and what it costs and reads, measured on text it was not fitted on."""

    kind: PolicyKind  # CORE or TOKEN
    density: float  # share of the feed-forward layers' bytes that a decoded token reads, correction included
    kl: float  # mean over positions of the KL divergence to the dense model in the same format, nats
    kl_p95: float  # 95 % of the windows have a mean KL below it
    top1: float  # share of positions with the dense model's likeliest token
    # Shares of the neurons that a token looked at, used, and read whole, see BackendInfo.neuron_bytes.
    reads: tuple[float, ...]
    choice: ChoiceKind | None = None  # of TOKEN
    shares: torch.Tensor | None = None  # of a core: share of each layer's neurons, float32 [layers]
    thresholds: torch.Tensor | None = None  # of TOKEN: float32 [layers, 2]
    correction: int = 0  # number of one of the index's corrections, from 1; 0: none


@dataclass(frozen=True, slots=True, eq=False)
class NeuronIndex:
    """Statistics, factors and the curve of what choices cost; see `Setting`.

    Scores are mean norm scores of prompts (`statistics.norm_score`), each layer of a prompt divided by its
    tokens.
    """

    model: str
    model_hash: str  # of the checkpoint's files
    tokenizer_hash: str
    format: str  # of the weights, BackendInfo.dtype
    prior: torch.Tensor  # float32 [layers, neurons], over all prompts
    cluster_layer: int  # whose scores tell prompts apart
    centroids: torch.Tensor  # float32 [clusters, neurons], of square roots of scores, of length 1
    clusters: torch.Tensor  # float16 [clusters, layers, neurons]
    settings: Sequence[Setting]
    planes_factors: torch.Tensor | None = None  # float32 [layers, neurons]
    gate_factors: torch.Tensor | None = None  # the same shape
    corrections: Sequence[Sequence[Correction]] = ()

    @property
    def choice(self) -> ChoiceTensors:
        """What a backend needs of it."""
        return ChoiceTensors(self.planes_factors, self.gate_factors, self.corrections)
