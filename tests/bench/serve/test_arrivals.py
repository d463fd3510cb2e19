"""Schedules have the statistics that were asked for, and are the seed's alone."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparserve.bench.serve.arrivals import Arrivals, Ramp
from sparserve.bench.serve.load import sweep
from sparserve.errors import ConfigError

COUNT = 20_000


def gaps_of(times):
    return np.diff(times, prepend=0.0)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness(burstiness):
    times = Arrivals(50.0, burstiness).schedule((1,), count=COUNT, duration=None)
    gaps = gaps_of(times)
    assert gaps.mean() == pytest.approx(1 / 50, rel=5 * burstiness**-0.5 / math.sqrt(COUNT))
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.08)


def test_poisson_arrivals_in_equal_windows_have_the_variance_of_their_mean():
    times = Arrivals(100.0).schedule((2,), count=None, duration=200.0)
    counts, _ = np.histogram(times, bins=2000, range=(0, 200))
    assert counts.mean() == pytest.approx(10, rel=0.03)
    assert counts.var() / counts.mean() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(("kind", "middle"), [("linear", 55.0), ("exponential", 10**1.5)])
def test_a_ramp_begins_and_ends_with_its_rates(kind, middle):
    times = Arrivals(ramp=Ramp(kind, 10.0, 100.0)).schedule((3,), count=None, duration=600.0)

    def rate(start, end):
        return ((times >= start) & (times < end)).sum() / (end - start)

    assert rate(0, 30) == pytest.approx(10, rel=0.35)
    assert rate(270, 330) == pytest.approx(middle, rel=0.15)
    assert rate(570, 600) == pytest.approx(100, rel=0.1)
    expected = Ramp(kind, 10.0, 100.0).expected(600.0)
    assert len(times) == pytest.approx(expected, rel=0.03)


@given(
    kind=st.sampled_from(["linear", "exponential"]),
    start=st.floats(0.1, 100),
    end=st.floats(0.1, 100),
    count=st.integers(1, 300),
)
def test_a_ramp_of_a_count_goes_upwards_and_ends_about_when_it_should(kind, start, end, count):
    ramp = Ramp(kind, start, end)
    seconds = ramp.length(count)
    assert ramp.expected(seconds) == pytest.approx(count)
    whole = np.linspace(0, count, 50)
    times = ramp.times(whole, seconds)
    assert (np.diff(times) > 0).all()
    assert times[0] == 0
    assert times[-1] == pytest.approx(seconds)


def test_the_seed_decides_the_schedule():
    arrivals = Arrivals(10.0, 0.5)
    one = arrivals.schedule((4, 1), count=100, duration=None)
    assert (one == arrivals.schedule((4, 1), count=100, duration=None)).all()
    assert (one != arrivals.schedule((4, 2), count=100, duration=None)).all()
    within = arrivals.schedule((4, 1), count=None, duration=5.0)
    assert (np.diff(within) >= 0).all()
    assert within.max() < 5.0


def test_without_a_rate_all_come_at_once():
    assert Arrivals().schedule((0,), count=3, duration=None).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "text", ["", "linear", "linear:1", "linear:0:5", "up:1:2", "linear:1:x", "linear:1:inf", "linear:1:2:3"]
)  # fmt: skip
def test_what_is_no_ramp_is_refused(text):
    with pytest.raises(ConfigError, match="such as linear:1:20"):
        Ramp.parse(text)


def test_what_cannot_be_a_load_is_refused(make_load):
    for load, words in (
        (make_load(0.0, count=1), "--request-rate is 0"),
        (make_load(math.nan, count=1), "--request-rate is nan"),
        (make_load(1.0, count=1, burstiness=0.0), "--burstiness"),
        (make_load(1.0), "give one of the two"),
        (make_load(1.0, count=1, seconds=1.0), "give one of the two"),
        (make_load(seconds=5.0), "without end"),
        (make_load(1.0, seconds=-1.0), "--duration"),
    ):
        with pytest.raises(ConfigError, match=words):
            load.check()
    with pytest.raises(ConfigError, match="are more than the 10000000"):
        Arrivals(1e6).schedule((0,), count=None, duration=3600.0)


def test_a_sweep_sets_what_was_left_open(make_load):
    loads = sweep(make_load(count=5), "concurrency", [1, 4])
    assert [load.label for load in loads] == ["1 at once", "4 at once"]
    assert [load.closed for load in loads] == [True, True]
    loads = sweep(make_load(count=5, users=2), "rate", [0.5])
    assert loads[0].label == "0.5/s, 2 at once"
    assert not loads[0].closed
    for load, kind, values in (
        (make_load(count=5, users=2), "concurrency", [1]),
        (make_load(3.0, count=5), "rate", [1]),
        (make_load(count=5), "concurrency", [1.5]),
    ):
        with pytest.raises(ConfigError, match="--sweep"):
            sweep(load, kind, values)
