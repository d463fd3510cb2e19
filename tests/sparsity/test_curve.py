"""The calibrated curve between, before and beyond its settings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserve.sparsity.curve import Curve
from sparserve.sparsity.index import Setting
from sparserve.sparsity.policy import PolicyKind


def point(density: float, kl: float, share: float | None = None) -> Setting:
    shares = torch.tensor([density if share is None else share])
    return Setting(PolicyKind.CORE, density, kl, 2 * kl, 1 - min(kl, 1), shares=shares)


@st.composite
def curves(draw):
    densities = draw(st.lists(st.integers(1, 99), min_size=1, max_size=8, unique=True))
    return Curve.of([point(d / 100, draw(st.floats(0, 10))) for d in densities])


@settings(max_examples=60, deadline=None)
@given(curve=curves(), ways=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted))
def test_what_reads_more_is_never_predicted_worse(curve, ways):
    low, high = (curve.at(curve.least + way * (1 - curve.least)) for way in ways)
    assert high.kl <= low.kl * (1 + 1e-9) + 1e-12
    assert high.top1 >= low.top1 - 1e-9
    assert 0 <= low.kl <= low.kl_p95
    assert low.shares.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(curve=curves(), target=st.floats(1e-13, 20))
def test_the_density_for_a_target_is_where_the_curve_meets_it(curve, target):
    density = curve.density_for(target)
    if density is None:
        assert curve.at(0.999999).kl > 0 or target < 1e-6
        return
    assert curve.at(density).kl <= target * (1 + 1e-6) + 1e-11
    below = density - 1e-3
    if below >= curve.least:
        assert curve.at(below).kl >= target * (1 - 1e-6) or target < 1e-6


def test_a_setting_that_others_beat_with_less_counts_as_what_they_cost():
    curve = Curve.of([point(0.8, 0.2), point(0.5, 0.1), point(0.3, 0.4)])
    assert [own.kl for own in curve.settings] == [0.4, 0.2, 0.2]


def test_logarithms_run_straight_and_the_end_is_dense():
    curve = Curve.of([point(0.4, 0.4), point(0.6, 0.1)])
    assert curve.at(0.5).kl == pytest.approx(math.sqrt(0.4 * 0.1))
    assert float(curve.at(0.5).shares) == pytest.approx(0.5)
    assert curve.at(0.8).kl == pytest.approx(0.05)
    assert float(curve.at(0.8).shares) == pytest.approx(0.8)
    assert (curve.at(1.0).kl, float(curve.at(1.0).shares)) == (0, 1)


def test_a_threshold_of_infinity_stays_with_the_nearer_setting():
    low, high = (
        Setting(PolicyKind.TOKEN, d, kl, kl, 0.5, thresholds=torch.tensor([[1.0, t, 0.0]]))
        for d, kl, t in ((0.4, 0.4, math.inf), (0.6, 0.1, 2.0))
    )
    curve = Curve.of([low, high])
    assert curve.at(0.45).thresholds.tolist() == [[1, math.inf, 0]]
    assert curve.at(0.55).thresholds.tolist() == [[1, 2, 0]]
