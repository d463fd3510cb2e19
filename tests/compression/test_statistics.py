"""Second moments, against NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserve.compression.statistics import InputMoments, NonFiniteInputs, nearest_to_outputs

KINDS = [InputMoments.full, InputMoments.diagonal]


def plain(inputs: torch.Tensor, like: InputMoments) -> np.ndarray:
    exact = inputs.double().numpy()
    return (exact**2).sum(0) if like.is_diagonal else exact.T @ exact


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(data=st.data())
def test_any_batches_add_up(kind, data):
    width = data.draw(st.integers(1, 20))
    batches = data.draw(st.lists(st.integers(0, 30), max_size=5))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scale = 10.0 ** data.draw(st.integers(-20, 20))
    inputs = [(torch.randn(n, width, generator=generator) * scale).to(dtype) for n in batches]
    moments = kind(width)
    for batch in inputs:
        moments.add(batch, "x")
    joined = torch.cat([torch.empty(0, width), *inputs])
    assert moments.tokens == sum(batches)
    assert moments.sums.dtype == torch.float64
    expected = plain(joined, moments)
    limit = 1e-5 * np.abs(expected).max(initial=0)
    np.testing.assert_allclose(moments.sums, expected, rtol=0, atol=limit)
    np.testing.assert_allclose(moments.squares, (joined.double() ** 2).sum(0), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_batches_give_the_same_bits(kind):
    inputs = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    one, again = kind(40), kind(40)
    for moments in (one, again):
        moments.add(inputs[:200], "x")
        moments.add(inputs[200:], "x")
    assert torch.equal(one.sums, again.sums)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_block_does_not_matter(kind, monkeypatch):
    inputs = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    whole, parts = kind(8), kind(8)
    whole.add(inputs, "x")
    monkeypatch.setattr("sparserve.compression.statistics.BLOCK_TOKENS", 7)
    parts.add(inputs, "x")
    torch.testing.assert_close(parts.sums, whole.sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite_are_refused_and_not_counted(kind, value):
    moments = kind(4)
    moments.add(torch.ones(3, 4), "x")
    before = moments.sums.clone()
    bad = torch.ones(5, 4)
    bad[1, 2] = bad[4, 0] = value
    with pytest.raises(NonFiniteInputs, match=r"inputs of layer 3: gate are .* in 2 of 5 tokens"):
        moments.add(bad, "layer 3: gate")
    assert moments.tokens == 3
    assert torch.equal(moments.sums, before)


def test_weights_nearest_to_outputs_are_those_of_ridge_regression(inputs_like, moments_of):
    x, weight = inputs_like(300, 20), torch.randn(7, 20)
    targets = x @ weight.T + torch.randn(300, 7)
    moments = moments_of(x)
    drift = (targets - x @ weight.T).double().T @ x.double()
    found = nearest_to_outputs(weight, moments, drift, 0.01)
    # As further rows of a least squares problem: sqrt(d) V = sqrt(d) W.
    root = (0.01 * moments.squares.mean()).sqrt() * torch.eye(20, dtype=torch.float64)
    rows = torch.cat((x.double(), root))
    wanted = torch.cat((targets.double(), root @ weight.double().T))
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    nothing = InputMoments.full(20)
    assert torch.equal(
        nearest_to_outputs(weight, nothing, torch.zeros(7, 20).double(), 0.01), weight
    )
