"""Where scores come from: the prompt, the clusters it is near to, or both by rank."""

import numpy as np
import pytest
import torch

from sparse_kernels.choice import Score
from sparserve.errors import InvalidRequest
from sparserve.sparsity.core import best_neurons, ranks
from sparserve.sparsity.policy import PredictorKind
from sparserve.sparsity.predictors import EVEN_TOKENS, MOST_OWN, STABLE_BONUS, predict

LAYERS, NEURONS = 4, 100
COUNTS = torch.full((LAYERS,), 20)


def top(scores: torch.Tensor) -> set[int]:
    return set(torch.nonzero(best_neurons(scores, COUNTS)[0]).flatten().tolist())


def peaks(*neurons: range) -> torch.Tensor:
    """Scores of 1 for `neurons`, next to nothing for the others."""
    scores = torch.full((LAYERS, NEURONS), 1e-6)
    for own in neurons:
        scores[:, own] = 1.0
    return scores / scores.sum(dim=1, keepdim=True)


@pytest.mark.parametrize(("used", "expected"), [(range(3), range(20)), (range(97, 100), range(80, 100))])  # fmt: skip
def test_similarity_takes_the_cluster_that_the_prompt_is_near_to(index, statistics, used, expected):
    prompt = statistics(peaks(used))
    scores, _ = predict(PredictorKind.SIMILARITY, Score.NORM, prompt, COUNTS, index)
    assert top(scores) == set(expected)


def test_a_prompt_between_clusters_mixes_them(index, statistics):
    prompt = statistics(peaks(range(3), range(97, 100)))
    scores, _ = predict(PredictorKind.SIMILARITY, Score.NORM, prompt, COUNTS, index)
    torch.testing.assert_close(scores, index.clusters.double().mean(dim=0))


def test_a_prompt_like_no_cluster_gets_the_prior_of_all(index, statistics):
    prompt = statistics(peaks(range(45, 55)))
    scores, _ = predict(PredictorKind.SIMILARITY, Score.NORM, prompt, COUNTS, index)
    assert torch.equal(scores, index.prior.double())


def test_stability_looks_at_the_prompt_alone(index, statistics):
    prompt = statistics(peaks(range(40, 60)))
    scores, stable = predict(PredictorKind.STABILITY, Score.NORM, prompt, COUNTS, index)
    assert top(scores) == set(range(40, 60))
    assert stable is True


@pytest.mark.parametrize("tokens", [20, 100, 200])
def test_auto_adds_ranks_by_the_length_of_the_prompt(index, statistics, tokens):
    own = torch.rand(LAYERS, NEURONS, generator=torch.Generator().manual_seed(1))
    prompt = statistics(own, tokens)
    found, stable = predict(PredictorKind.AUTO, Score.COUNT, prompt, COUNTS, index)
    weight = MOST_OWN * (tokens - 1) / (tokens - 1 + EVEN_TOKENS) + STABLE_BONUS * stable

    def plain_ranks(scores):  # of one layer: 1 is best, the lower neuron first
        order = sorted(range(NEURONS), key=lambda n: (-scores[n], n))
        places = np.empty(NEURONS)
        places[order] = np.linspace(1, 0, NEURONS)
        return places

    expected = weight * plain_ranks(prompt.total().scores()[2].tolist()) + (
        1 - weight
    ) * plain_ranks(index.prior[2].tolist())
    np.testing.assert_allclose(found[2].numpy(), expected, atol=1e-12)


def test_a_prompt_of_one_token_takes_the_prior_where_there_is_one(index, statistics):
    prompt = statistics(peaks(range(3)), tokens=1)
    scores, stable = predict(PredictorKind.AUTO, Score.NORM, prompt, COUNTS, index)
    assert torch.equal(scores, index.prior.double())
    assert stable is None
    with pytest.raises(InvalidRequest, match="one token"):
        predict(PredictorKind.STABILITY, Score.NORM, prompt, COUNTS, index)


def test_ranks_of_equal_scores_fall_with_the_neuron():
    assert ranks(torch.tensor([[5.0, 7, 7, 5, 5]])).tolist() == [[0.5, 1, 0.75, 0.25, 0]]
