"""Policies become choices: budgets, ties, what is refused, and that nothing but the prompt counts."""

from dataclasses import dataclass, field

import pytest
import torch

from sparse_kernels.choice import ALL_NEURONS, ChoiceKind, Score
from sparserve.errors import InvalidRequest, SparsityUnavailable
from sparserve.sparsity.chooser import Chooser
from sparserve.sparsity.policy import DraftKind, Policy, PolicyKind, PredictorKind
from sparserve.sparsity.statistics import NeuronStatistics, PromptStatistics

LAYERS, NEURONS = 4, 100
CORE = PolicyKind.CORE


@dataclass(frozen=True)
class Shape:
    num_layers: int = LAYERS
    intermediate_size: int = NEURONS


@dataclass(frozen=True)
class Reads:
    choices: frozenset = frozenset({ChoiceKind.GATE, ChoiceKind.PLANES})
    neuron_bytes: dict = field(
        default_factory=lambda: {
            None: (10.0, 20.0, 0.0),
            ChoiceKind.GATE: (10.0, 20.0, 0.0),
            ChoiceKind.PLANES: (10.0, 10.0, 10.0),
        }
    )


def statistics(scores: torch.Tensor, tokens: int = 200) -> PromptStatistics:
    """Of a prompt all of whose blocks score alike; its first token does not count."""
    prompt = PromptStatistics(16)
    for first in range(0, tokens, 16):
        counted = min(16, tokens - first) - (first == 0)
        sums = (scores * counted * 2**32).long()
        prompt.extend(first, [NeuronStatistics(sums, counted)])
    return prompt


def falling() -> torch.Tensor:
    """Scores that fall with the neuron's number, [LAYERS, NEURONS]."""
    return torch.linspace(1, 0.01, NEURONS).expand(LAYERS, NEURONS) / NEURONS


def members(chooser, policy, prompt):
    return chooser.plan(policy).choose(prompt).choice.members(NEURONS)


def test_dense_chooses_nothing():
    plan = Chooser(Shape(), Reads()).plan(Policy())
    assert plan.choose(None).choice is ALL_NEURONS
    assert (plan.density, plan.predicted_kl, plan.score) == (1, 0, None)


@pytest.mark.parametrize(
    ("density", "count"), [(0.005, 1), (0.074, 7), (0.075, 8), (0.5, 50), (1, 100)]
)
def test_a_core_has_the_best_neurons_rounded_halves_up_and_never_none(density, count):
    chosen = members(Chooser(Shape(), Reads()), Policy(CORE, density), statistics(falling()))
    expected = torch.arange(NEURONS) < count
    assert torch.equal(chosen, expected.expand(LAYERS, NEURONS))


def test_of_equal_scores_the_lower_neuron_is_taken():
    flat = torch.full((LAYERS, NEURONS), 0.01)
    chosen = members(Chooser(Shape(), Reads()), Policy(CORE, 0.3), statistics(flat))
    assert torch.equal(chosen[2], torch.arange(NEURONS) < 30)


def test_layers_outside_the_bounds_stay_dense_and_the_density_is_of_all():
    policy = Policy(CORE, 0.75, first_layer=1, last_layer=3)
    chosen = members(Chooser(Shape(), Reads()), policy, statistics(falling()))
    assert chosen.sum(dim=1).tolist() == [100, 50, 50, 100]


def test_coverage_is_the_share_of_the_score_that_the_core_holds():
    prompt = statistics(falling())
    chosen = Chooser(Shape(), Reads()).plan(Policy(CORE, 0.25)).choose(prompt)
    scores = prompt.total().scores()
    expected = (scores[:, :25].sum(dim=1) / scores.sum(dim=1)).mean()
    assert chosen.coverage == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (Policy(CORE, 0.0), "density"),
        (Policy(CORE, 1.01), "density"),
        (Policy(CORE, float("nan")), "density"),
        (Policy(CORE, target_kl=0.0), "target_kl"),
        (Policy(CORE, target_kl=float("inf")), "target_kl"),
        (Policy(CORE, 0.5, target_kl=0.1), "target_kl"),
        (Policy(CORE, 0.5, alpha=0.3), "alpha"),
        (Policy(CORE, 0.5, score=Score.COUNT, alpha=1.5), "alpha"),
        (Policy(CORE, 0.5, choice=ChoiceKind.GATE), "choice"),
        (Policy(CORE, 0.5, draft=DraftKind.CORE), "draft"),
        (Policy(CORE, 0.5, first_layer=4), "first_layer"),
        (Policy(CORE, 0.5, first_layer=2, last_layer=2), "first_layer"),
        (Policy(CORE, 0.2, first_layer=1, last_layer=2), "density"),
        (Policy(CORE, 0.5, refresh_interval=-1), "refresh_interval"),
        (Policy(CORE, 0.5, predictor=PredictorKind.SIMILARITY, score=Score.COUNT), "score"),
        (Policy(density=0.5), "density"),
        (Policy(PolicyKind.EXACT, draft_tokens=0), "draft_tokens"),
        (Policy(PolicyKind.EXACT, draft=DraftKind.CORE, core_density=0.5), "core_density"),
    ],
)
def test_what_cannot_work_is_refused_by_its_field(policy, field):
    with pytest.raises(InvalidRequest) as caught:
        Chooser(Shape(), Reads()).plan(policy)
    assert caught.value.field == f"sparsity.{field}"


@pytest.mark.parametrize(
    "policy",
    [
        Policy(PolicyKind.TOKEN, 0.5),
        Policy(PolicyKind.AUTO),
        Policy(CORE, target_kl=0.1),
        Policy(CORE, 0.5, predictor=PredictorKind.SIMILARITY),
        Policy(PolicyKind.EXACT, draft=DraftKind.TOKEN),
    ],
)
def test_what_needs_an_index_says_how_to_make_one(policy):
    with pytest.raises(SparsityUnavailable, match="sparserve calibrate"):
        Chooser(Shape(), Reads()).plan(policy)


def test_without_an_index_there_are_dense_core_and_exact():
    assert Chooser(Shape(), Reads()).policies == (PolicyKind.DENSE, CORE, PolicyKind.EXACT)


def test_a_prompt_of_one_token_has_no_core_of_its_own():
    plan = Chooser(Shape(), Reads()).plan(Policy(CORE, 0.5))
    with pytest.raises(InvalidRequest, match="one token"):
        plan.choose(statistics(falling(), tokens=1))


def test_exact_drafts_with_a_core_and_computes_densely():
    plan = Chooser(Shape(), Reads()).plan(Policy(PolicyKind.EXACT, 0.4, draft=DraftKind.CORE))
    assert plan.choose(None).choice is ALL_NEURONS
    assert plan.score is Score.NORM
    drafted = plan.drafts.choose(statistics(falling())).choice.members(NEURONS)
    assert drafted.sum(dim=1).tolist() == [40] * LAYERS


@pytest.mark.parametrize(("tokens", "stable"), [(127, False), (129, True)])
def test_a_prompt_that_does_not_change_is_stable_once_it_is_long_enough(tokens, stable):
    plan = Chooser(Shape(), Reads()).plan(Policy(CORE, 0.5))
    assert plan.choose(statistics(falling(), tokens)).stable is stable


def test_a_prompt_whose_second_half_uses_other_neurons_is_not_stable():
    prompt = PromptStatistics(16)
    for first in range(0, 512, 16):
        scores = falling() if first < 256 else 3 * falling().flip(1)
        prompt.extend(first, [NeuronStatistics((scores * 16 * 2**32).long(), 16)])
    assert Chooser(Shape(), Reads()).plan(Policy(CORE, 0.3)).choose(prompt).stable is False


def test_a_choice_depends_on_its_own_prompt_alone():
    plan = Chooser(Shape(), Reads()).plan(Policy(CORE, 0.3))
    prompts = [statistics(falling()), statistics(falling().flip(1))]
    forth = [plan.choose(prompt).choice.core for prompt in prompts]
    back = [plan.choose(prompt).choice.core for prompt in prompts[::-1]][::-1]
    assert not torch.equal(*forth)
    assert all(map(torch.equal, forth, back))
