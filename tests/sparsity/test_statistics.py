"""GRIFFIN's norm score (arXiv 2402.19427, equation 4) and its exact sums."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserve.sparsity.statistics import UNIT, NeuronStatistics, PromptStatistics, norm_score


def activations(tokens: int, neurons: int, seed: int) -> torch.Tensor:
    """Heavy-tailed, as those of a SwiGLU are."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, tokens, neurons, generator=generator)
    return torch.nn.functional.silu(3 * gate) * up


def defined_scores(a: torch.Tensor) -> torch.Tensor:
    a = a.double()
    return (a / a.norm(dim=1, keepdim=True)).square()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e3, 1e30])
def test_score_is_the_squared_share_of_the_tokens_norm_at_any_scale(seed, scale):
    a = activations(9, 500, seed) * scale
    torch.testing.assert_close(
        norm_score(a) * UNIT, defined_scores(a), atol=2 * UNIT, rtol=1e-6, check_dtype=False
    )


def test_scores_of_a_token_add_up_to_1():
    sums = norm_score(activations(20, 1536, 4)).sum(dim=1) * UNIT
    torch.testing.assert_close(sums, torch.ones(20), atol=1536 * UNIT, rtol=0, check_dtype=False)


def test_a_token_that_activates_nothing_scores_0():
    a = activations(3, 40, 5)
    a[1] = 0
    scores = norm_score(a)
    assert not scores[1].any()
    assert torch.equal(scores[[0, 2]], norm_score(a[[0, 2]]))


def test_a_single_active_neuron_takes_the_whole_score():
    a = torch.zeros(1, 8)
    a[0, 3] = -1e-20
    assert norm_score(a).tolist() == [[0, 0, 0, 2**32, 0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_activations_may_have_any_float_type(dtype):
    a = activations(4, 60, 6).to(dtype)
    torch.testing.assert_close(
        norm_score(a) * UNIT, defined_scores(a), atol=2 * UNIT, rtol=1e-6, check_dtype=False
    )


def statistics_of(chunks: list[torch.Tensor]) -> NeuronStatistics:
    """One statistics object fed chunk by chunk; the activations stand for two layers."""
    total = NeuronStatistics.zeros(2, chunks[0].shape[1])
    for a in chunks:
        sums = torch.stack((norm_score(a).sum(dim=0), norm_score(a.flip(1)).sum(dim=0)))
        total += NeuronStatistics(sums, len(a))
    return total


@given(cuts=st.sets(st.integers(1, 69), max_size=12), seed=st.integers(0, 2**20))
@settings(max_examples=40, deadline=None)
def test_sums_do_not_depend_on_how_tokens_were_cut_or_ordered(cuts, seed):
    a = activations(70, 96, seed)
    whole = statistics_of([a])
    bounds = [0, *sorted(cuts), 70]
    parts = [a[i:j] for i, j in itertools.pairwise(bounds)]
    for chunks in (parts, parts[::-1]):
        cut = statistics_of(chunks)
        assert torch.equal(cut.sums, whole.sums)
        assert cut.tokens == whole.tokens == 70


def test_a_score_does_not_depend_on_the_other_tokens_of_the_batch():
    a = activations(64, 1536, 7)
    scores = norm_score(a)
    for rows in (slice(0, 1), slice(63, 64), slice(3, 40)):
        assert torch.equal(norm_score(a[rows]), scores[rows])


def test_statistics_that_a_forward_returned_can_be_added_to():
    """They are made under inference_mode, which forbids in-place changes outside of it."""
    with torch.inference_mode():
        first = statistics_of([activations(3, 10, 8)])
        second = statistics_of([activations(2, 10, 9)])
    expected = first.sums + second.sums
    first += second
    assert first.tokens == 5
    assert torch.equal(first.sums, expected)


def test_scores_are_the_sums_in_units_of_1():
    statistics = NeuronStatistics(torch.tensor([[2**31, 3 * 2**32, 0]]), 4)
    assert statistics.scores().dtype == torch.float64
    assert statistics.scores().tolist() == [[0.5, 3.0, 0.0]]


def defined_share(layers: list[list[int]], fraction: float) -> Fraction:
    """Mean over layers of the least share of neurons whose score reaches the fraction."""
    shares = []
    for layer in layers:
        ordered = sorted(layer, reverse=True)
        count = 1  # a set of neurons is never empty
        while sum(ordered[:count]) < Fraction(fraction) * sum(ordered):
            count += 1
        shares.append(Fraction(count, len(layer)))
    return sum(shares, Fraction(0)) / len(shares)


@given(
    layers=st.integers(1, 40).flatmap(
        lambda width: st.lists(
            st.lists(st.integers(0, 2**20), min_size=width, max_size=width), min_size=1, max_size=4
        )
    ),
    fraction=st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.875, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_share_holding_is_the_least_share_of_neurons_with_that_score(layers, fraction):
    statistics = NeuronStatistics(torch.tensor(layers), 1)
    assert statistics.share_holding(fraction) == pytest.approx(
        float(defined_share(layers, fraction)), abs=1e-12
    )


def test_share_holding_of_one_dominant_neuron_and_of_equal_ones():
    dominant, equal = [1000] + [1] * 9, [7] * 10
    assert NeuronStatistics(torch.tensor([dominant]), 1).share_holding(0.9) == 0.1
    assert NeuronStatistics(torch.tensor([equal]), 1).share_holding(0.5) == 0.5
    both = NeuronStatistics(torch.tensor([dominant, equal]), 1)
    assert both.share_holding(0.5) == pytest.approx(0.3)


@pytest.mark.parametrize(("tokens", "half"), [(1, None), (16, None), (17, 15), (40, 15), (64, 31)])
def test_the_first_half_is_the_first_half_of_the_blocks(tokens, half):
    scores = norm_score(activations(tokens, 30, 5))
    scores[0] = 0  # the attention sink counts nowhere
    prompt = PromptStatistics(16)
    for first in range(0, tokens, 16):
        part = scores[first : first + 16]
        prompt.extend(first, [NeuronStatistics(part.sum(dim=0)[None], len(part) - (first == 0))])
    found = prompt.first_half()
    if half is None:
        assert found is None
        return
    assert found.tokens == half
    expected = scores[: half + 1].sum(dim=0).double() * UNIT
    torch.testing.assert_close(found.scores()[0], expected, atol=0, rtol=2e-3)  # blocks are fp16
