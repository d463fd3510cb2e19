"""Scores of neurons from a prompt's statistics, from a calibrated index, or from both."""

from __future__ import annotations

import torch

from sparse_kernels.choice import Score
from sparserve.errors import InvalidRequest
from sparserve.sparsity.core import is_stable, ranks
from sparserve.sparsity.index import NeuronIndex
from sparserve.sparsity.policy import PredictorKind
from sparserve.sparsity.statistics import NeuronStatistics, PromptStatistics

# Of mixing clusters: the softmax's temperature, and the cosine below which a prompt is like none of them.
CLUSTER_TEMPERATURE = 0.1
LEAST_COSINE = 0.3
# Of `auto`: the weight of the prompt's own ranks is MOST_OWN tokens / (tokens + EVEN_TOKENS), and more where
# its core is stable. Rank aggregation as in GLASS, arXiv 2508.14302; measured best on SmolLM2 at 256, 64 and 24
# tokens: .6 to .8, .3 to .7, .3 to .6.
MOST_OWN, EVEN_TOKENS = 0.7, 24
STABLE_BONUS = 0.1


def predict(
    predictor: PredictorKind,
    score: Score,
    prompt: PromptStatistics | None,
    counts: torch.Tensor,
    index: NeuronIndex | None,
) -> tuple[torch.Tensor, bool | None]:
    """-> (scores [layers, neurons] float64, whether the prompt's own core of `counts` [layers] neurons is
    stable; None without statistics).

    Raises InvalidRequest of a prompt without statistics, which has one token, where they are all there is.
    """
    total = None if prompt is None else prompt.total()
    if prompt is None or total is None or total.tokens == 0:
        if index is None or predictor is PredictorKind.STABILITY:
            raise InvalidRequest(
                "sparsity.predictor",
                "the prompt has one token, which tells nothing of its neurons; give a longer one, or take "
                "policy dense or token",
            )
        return index.prior.double(), None
    stable = is_stable(prompt, counts)
    if index is None or predictor is PredictorKind.STABILITY:
        return total.scores(), stable
    prior = mixed_prior(index, total) if score is Score.NORM else index.prior.double()
    if predictor is PredictorKind.SIMILARITY:
        return prior, stable
    own = MOST_OWN * total.tokens / (total.tokens + EVEN_TOKENS) + STABLE_BONUS * stable
    return own * ranks(total.scores()) + (1 - own) * ranks(prior), stable


def embedding(layer_scores: torch.Tensor) -> torch.Tensor:
    """What prompts are compared by: norm scores of one layer [..., neurons] -> float32, length 1."""
    return torch.nn.functional.normalize(layer_scores.double().sqrt(), dim=-1).float()


def mixed_prior(index: NeuronIndex, prompt: NeuronStatistics) -> torch.Tensor:
    """Mean scores of the clusters that a prompt is near to, float64 [layers, neurons]; those of all
    prompts where it is near to none."""
    cosines = index.centroids @ embedding(prompt.scores()[index.cluster_layer])
    if not len(cosines) or cosines.max() < LEAST_COSINE:
        return index.prior.double()
    weights = (cosines.double() / CLUSTER_TEMPERATURE).softmax(dim=0)
    return torch.einsum("k,kln->ln", weights, index.clusters.double())
