"""Policies become choices: budgets, ties, what is refused, and that nothing but the prompt counts."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_kernels.choice import ALL_NEURONS, ChoiceKind, Score
from sparserve.errors import InvalidRequest, SparsityUnavailable
from sparserve.sparsity.chooser import Chooser
from sparserve.sparsity.policy import DraftKind, Policy, PolicyKind, PredictorKind
from sparserve.sparsity.statistics import NeuronStatistics, PromptStatistics

LAYERS, NEURONS = 4, 100
CORE = PolicyKind.CORE


def members(of, policy, prompt):
    return of.plan(policy).choose(prompt).choice.members(NEURONS)


def test_dense_chooses_nothing(chooser):
    plan = chooser.plan(Policy())
    assert plan.choose(None).choice is ALL_NEURONS
    assert (plan.density, plan.predicted_kl, plan.score) == (1, 0, None)


@pytest.mark.parametrize(
    ("density", "count"), [(0.005, 1), (0.074, 7), (0.075, 8), (0.5, 50), (1, 100)]
)
def test_a_core_has_the_best_neurons_rounded_halves_up_and_never_none(
    chooser, falling, statistics, density, count
):
    chosen = members(chooser, Policy(CORE, density), statistics(falling))
    expected = torch.arange(NEURONS) < count
    assert torch.equal(chosen, expected.expand(LAYERS, NEURONS))


def test_of_equal_scores_the_lower_neuron_is_taken(chooser, statistics):
    flat = torch.full((LAYERS, NEURONS), 0.01)
    chosen = members(chooser, Policy(CORE, 0.3), statistics(flat))
    assert torch.equal(chosen[2], torch.arange(NEURONS) < 30)


def test_layers_outside_the_bounds_stay_dense_and_the_density_is_of_all(
    chooser, falling, statistics
):
    policy = Policy(CORE, 0.75, first_layer=1, last_layer=3)
    chosen = members(chooser, policy, statistics(falling))
    assert chosen.sum(dim=1).tolist() == [100, 50, 50, 100]


def test_coverage_is_the_share_of_the_score_that_the_core_holds(chooser, falling, statistics):
    prompt = statistics(falling)
    chosen = chooser.plan(Policy(CORE, 0.25)).choose(prompt)
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
def test_what_cannot_work_is_refused_by_its_field(chooser, policy, field):
    with pytest.raises(InvalidRequest) as caught:
        chooser.plan(policy)
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
def test_what_needs_an_index_says_how_to_make_one(chooser, policy):
    with pytest.raises(SparsityUnavailable, match="sparserve calibrate"):
        chooser.plan(policy)


def test_without_an_index_there_are_dense_core_and_exact(chooser):
    assert chooser.policies == (PolicyKind.DENSE, CORE, PolicyKind.EXACT)


def test_a_prompt_of_one_token_has_no_core_of_its_own(chooser, falling, statistics):
    plan = chooser.plan(Policy(CORE, 0.5))
    with pytest.raises(InvalidRequest, match="one token"):
        plan.choose(statistics(falling, tokens=1))


def test_exact_drafts_with_a_core_and_computes_densely(chooser, falling, statistics):
    plan = chooser.plan(Policy(PolicyKind.EXACT, 0.4, draft=DraftKind.CORE))
    assert plan.choose(None).choice is ALL_NEURONS
    assert plan.score is Score.NORM
    drafted = plan.drafts.choose(statistics(falling)).choice.members(NEURONS)
    assert drafted.sum(dim=1).tolist() == [40] * LAYERS


@pytest.mark.parametrize(("tokens", "stable"), [(127, False), (129, True)])
def test_a_prompt_that_does_not_change_is_stable_once_it_is_long_enough(
    chooser, falling, statistics, tokens, stable
):
    plan = chooser.plan(Policy(CORE, 0.5))
    assert plan.choose(statistics(falling, tokens)).stable is stable


def test_a_prompt_whose_second_half_uses_other_neurons_is_not_stable(chooser, falling):
    prompt = PromptStatistics(16)
    for first in range(0, 512, 16):
        scores = falling if first < 256 else 3 * falling.flip(1)
        prompt.extend(first, [NeuronStatistics((scores * 16 * 2**32).long(), 16)])
    assert chooser.plan(Policy(CORE, 0.3)).choose(prompt).stable is False


def test_a_choice_depends_on_its_own_prompt_alone(chooser, falling, statistics):
    plan = chooser.plan(Policy(CORE, 0.3))
    prompts = [statistics(falling), statistics(falling.flip(1))]
    forth = [plan.choose(prompt).choice.core for prompt in prompts]
    back = [plan.choose(prompt).choice.core for prompt in prompts[::-1]][::-1]
    assert not torch.equal(*forth)
    assert all(map(torch.equal, forth, back))


def test_with_an_index_there_are_all_policies(calibrated):
    assert set(calibrated.policies) == set(PolicyKind)


def test_choices_that_the_backend_cannot_make_are_not_offered(shape, reads, index):
    only_cores = Chooser(shape, replace(reads, choices=frozenset()), index)
    assert PolicyKind.TOKEN not in only_cores.policies
    assert only_cores.plan(Policy(PolicyKind.AUTO, 0.6)).policy.kind is CORE
    with pytest.raises(SparsityUnavailable):
        only_cores.plan(Policy(PolicyKind.TOKEN, 0.6))


def test_token_takes_the_best_kind_at_a_density(calibrated):
    plan = calibrated.plan(Policy(PolicyKind.TOKEN, 0.6))
    assert plan.policy.choice is ChoiceKind.PLANES
    assert (plan.density, plan.predicted_kl, plan.score) == (0.6, pytest.approx(0.04), None)
    chosen = plan.choose(None).choice
    assert chosen.core is None
    torch.testing.assert_close(chosen.thresholds, torch.tensor([[0.4, 0.8, 1.6]]).expand(LAYERS, 3))


def test_between_settings_thresholds_run_straight_and_logarithms_of_kl_too(calibrated):
    plan = calibrated.plan(Policy(PolicyKind.TOKEN, 0.7, choice=ChoiceKind.PLANES))
    assert plan.predicted_kl == pytest.approx((0.04 * 0.01) ** 0.5)
    torch.testing.assert_close(
        plan.choose(None).choice.thresholds, torch.tensor([[0.3, 0.6, 1.2]]).expand(LAYERS, 3)
    )


def test_a_choice_by_the_gate_is_made_where_it_is_asked_for(calibrated):
    plan = calibrated.plan(Policy(PolicyKind.TOKEN, 0.8, choice=ChoiceKind.GATE))
    assert plan.choose(None).choice.kind is ChoiceKind.GATE
    assert plan.predicted_kl == pytest.approx(0.05)


def test_a_token_can_choose_inside_a_core_that_was_measured(calibrated, statistics, falling):
    policy = Policy(PolicyKind.TOKEN, 0.5, choice=ChoiceKind.PLANES, core_density=0.7)
    plan = calibrated.plan(policy)
    chosen = plan.choose(statistics(falling)).choice
    assert chosen.kind is ChoiceKind.PLANES
    assert chosen.members(NEURONS).sum(dim=1).tolist() == [70] * LAYERS
    assert plan.predicted_kl == pytest.approx(0.2)


def test_inside_any_other_core_what_is_looked_at_is_saved_and_no_kl_is_predicted(
    calibrated, statistics, falling
):
    policy = Policy(PolicyKind.TOKEN, 0.6, choice=ChoiceKind.PLANES, core_density=0.4)
    plan = calibrated.plan(policy)
    chosen = plan.choose(statistics(falling)).choice
    assert chosen.members(NEURONS).sum(dim=1).tolist() == [40] * LAYERS
    # Of neurons in three equal parts, 60 % are not looked at: a choice among all reads .2 more.
    torch.testing.assert_close(chosen.thresholds[:, 0], torch.full((LAYERS,), 0.2))
    assert (plan.density, plan.predicted_kl) == (0.6, None)


def test_corrections_are_taken_where_they_make_a_core_better(calibrated):
    assert calibrated.plan(Policy(CORE, 0.55)).setting.correction == 1
    assert calibrated.plan(Policy(CORE, 0.45)).setting.correction == 0


def test_below_the_measured_a_core_shrinks_and_no_kl_is_predicted(calibrated, statistics, falling):
    plan = calibrated.plan(Policy(CORE, 0.1))
    sizes = plan.choose(statistics(falling)).choice.members(NEURONS).sum(dim=1)
    assert sizes.tolist() == [10] * LAYERS
    assert plan.predicted_kl is None


@pytest.mark.parametrize("kind", [PolicyKind.TOKEN, PolicyKind.AUTO])
def test_a_density_that_no_curve_reaches_is_refused_with_the_least(calibrated, kind):
    with pytest.raises(InvalidRequest, match=r"0\.05; .* 0\.[34]00") as caught:
        calibrated.plan(Policy(kind, 0.05))
    assert caught.value.field == "sparsity.density"


def test_density_1_is_every_neuron(calibrated, statistics, falling):
    core = calibrated.plan(Policy(CORE, 1.0))
    assert core.choose(statistics(falling)).choice.members(NEURONS).all()
    assert core.predicted_kl == 0
    token = calibrated.plan(Policy(PolicyKind.TOKEN, 1.0)).choose(None).choice
    assert not token.thresholds.any()


def test_what_was_not_measured_is_not_predicted(calibrated):
    for policy in (
        Policy(CORE, 0.5, predictor=PredictorKind.STABILITY),
        Policy(CORE, 0.5, score=Score.COUNT),
        Policy(CORE, 0.6, first_layer=1),
    ):
        assert calibrated.plan(policy).predicted_kl is None
    with pytest.raises(InvalidRequest, match="predictor"):
        calibrated.plan(Policy(CORE, target_kl=0.1, predictor=PredictorKind.STABILITY))


KINDS = st.sampled_from([CORE, PolicyKind.TOKEN, PolicyKind.AUTO])


@given(kind=KINDS, targets=st.tuples(*[st.floats(1e-6, 10)] * 2).map(sorted))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stricter_target_never_reads_less_and_every_target_is_kept(calibrated, kind, targets):
    strict, lax = (calibrated.plan(Policy(kind, target_kl=target)) for target in targets)
    assert strict.density >= lax.density
    for plan, target in zip((strict, lax), targets, strict=True):
        assert plan.predicted_kl <= target * (1 + 1e-6)
        assert plan.policy.kind is not PolicyKind.AUTO


@given(densities=st.tuples(*[st.floats(0.45, 1)] * 2).map(sorted))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_more_density_never_costs_more(calibrated, densities):
    sparse, dense = (calibrated.plan(Policy(PolicyKind.AUTO, d)) for d in densities)
    assert dense.predicted_kl <= sparse.predicted_kl * (1 + 1e-9)


def test_a_resolved_policy_can_be_planned_again(calibrated):
    for policy in (
        Policy(PolicyKind.AUTO),
        Policy(PolicyKind.AUTO, target_kl=0.3),
        Policy(PolicyKind.TOKEN, 0.5, core_density=0.7),
        Policy(CORE),
        Policy(PolicyKind.EXACT, draft=DraftKind.TOKEN),
    ):
        plan = calibrated.plan(policy)
        again = calibrated.plan(plan.policy)
        assert (again.density, again.predicted_kl) == (plan.density, plan.predicted_kl)
