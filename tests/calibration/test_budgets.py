"""Budgets by layer: what a density allows, given where it saves most."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserve.calibration.budgets import BAND, STEP, allocate

GRID = (0.3, 0.5, 0.7)
LOSSES = st.lists(st.tuples(*[st.floats(0, 2)] * 3), min_size=1, max_size=5)


@given(rows=LOSSES, density=st.floats(0.02, 1))
@settings(max_examples=50, deadline=None)
def test_shares_have_the_density_for_their_mean_and_stay_near_it(rows, density):
    shares = allocate(torch.tensor(rows), GRID, density)
    assert float(shares.mean()) == pytest.approx(density, abs=1e-4)
    assert (shares > 0).all()
    assert (shares <= 1).all()
    assert ((shares - density).abs() <= BAND + 1e-6).all()


def test_equal_layers_get_equal_shares():
    shares = allocate(torch.tensor([[0.3, 0.2, 0.1]] * 8), GRID, 0.5)
    assert float(shares.max() - shares.min()) <= STEP + 1e-6


def test_a_layer_that_costs_more_gets_more():
    shares = allocate(
        torch.tensor([[0.1, 0.05, 0.02], [1, 0.5, 0.2], [0.1, 0.05, 0.02]]), GRID, 0.5
    )
    assert shares[1] > shares[0] + 0.1
    assert float(shares[0]) == pytest.approx(float(shares[2]), abs=STEP + 1e-6)


def test_no_other_shares_cost_less():
    """Of exponential losses, against all shares on the same grid of steps."""
    weights, density = (0.1, 1.0, 0.4), 0.5
    losses = torch.tensor([[w * 2.0 ** (-8 * f) for f in GRID] for w in weights])

    def cost(shares):
        return sum(w * 2.0 ** (-8 * f) for w, f in zip(weights, shares, strict=True))

    found = allocate(losses, GRID, density)
    steps = [0.3 + STEP * n for n in range(int(0.4 / STEP) + 1)]
    best = min(
        cost((a, b, 1.5 - a - b))
        for a, b in itertools.product(steps, repeat=2)
        if 0.3 <= 1.5 - a - b <= 0.7
    )
    assert cost(found.tolist()) <= best * 1.02
