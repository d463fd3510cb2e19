"""Bytes given out: against all ways there are, and against a plain greedy one."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserve.compression.allocation import Option, give_out, ladder, totals

# Small whole numbers: sums are exact, and there are ties.
OPTIONS = st.lists(
    st.builds(Option, st.integers(1, 12), st.integers(0, 12).map(float)), min_size=1, max_size=4
)
ITEMS = st.lists(OPTIONS, min_size=1, max_size=4)


def every_way(items) -> list[tuple[int, float]]:
    return [totals(items, places) for places in itertools.product(*(range(len(o)) for o in items))]


@given(options=OPTIONS)
def test_a_ladder_is_what_lies_below_every_line(options):
    steps = [options[place] for place in ladder(options)]
    assert steps[0].size == min(own.size for own in options)
    assert steps[-1].loss == min(own.loss for own in options)
    slopes = [(b.loss - a.loss) / (b.size - a.size) for a, b in itertools.pairwise(steps)]
    assert all(slope < 0 for slope in slopes)
    assert slopes == sorted(slopes)
    for own in options:
        for a, b in itertools.pairwise(steps):
            line = a.loss + (b.loss - a.loss) / (b.size - a.size) * (own.size - a.size)
            assert own.loss >= line - 1e-9


@settings(deadline=None, max_examples=50)
@given(items=ITEMS, spare=st.integers(0, 30))
def test_what_fits_is_the_best_of_its_size_but_for_a_last_step(items, spare):
    """A greedy allocation along hulls is within one step's gain of the best there is."""
    least = sum(min(own.size for own in options) for options in items)
    places = give_out(items, most_bytes=least + spare)
    size, loss = totals(items, places)
    assert size <= least + spare
    best = min(other for bytes_, other in every_way(items) if bytes_ <= least + spare)
    largest_step = max(
        (options[a].loss - options[b].loss)
        for options in items
        for steps in [[ladder(options)[0], *ladder(options)]]
        for a, b in itertools.pairwise(steps)
    )
    assert best <= loss <= best + largest_step


@settings(deadline=None, max_examples=50)
@given(items=ITEMS, aim=st.integers(0, 40))
def test_an_aim_is_reached_with_no_step_too_many(items, aim):
    lowest = sum(min(own.loss for own in options) for options in items)
    places = give_out(items, most_loss=lowest + aim)
    _, loss = totals(items, places)
    assert loss <= lowest + aim
    for item, options in enumerate(items):
        steps = ladder(options)
        before = steps.index(places[item]) - 1
        if before >= 0:
            worse = totals(items, [*places[:item], steps[before], *places[item + 1 :]])[1]
            assert worse > lowest + aim, "this step is not needed"


@settings(deadline=None, max_examples=50)
@given(items=ITEMS)
def test_more_bytes_never_lose_more(items):
    """Where all steps cost the same; else a large one may keep small ones out."""
    even = [
        [Option(place, own.loss) for place, own in enumerate(sorted(o, key=lambda x: -x.loss))]
        for o in items
    ]
    convex = [[options[place] for place in ladder(options)] for options in even]
    steps_of_one = [
        o for o in convex if all(b.size - a.size == 1 for a, b in itertools.pairwise(o))
    ]
    losses = [totals(steps_of_one, give_out(steps_of_one, most_bytes=n))[1] for n in range(20)]
    assert losses == sorted(losses, reverse=True)


def test_equal_items_get_steps_in_their_order():
    options = [Option(10, 8.0), Option(20, 2.0), Option(30, 1.0)]
    assert give_out([options] * 3, most_bytes=50) == [1, 1, 0]
    assert give_out([options] * 3, most_bytes=79) == [2, 1, 1]


@pytest.mark.parametrize("limits", [{"most_bytes": 45}, {"most_loss": 2.75}])
def test_bytes_go_where_they_gain_most(limits):
    items = [[Option(10, 1.0), Option(20, 0.5)], [Option(10, 9.0), Option(20, 2.0)]]
    small = [Option(5, 0.1), Option(10, 0.0)]
    assert give_out([*items, small], **limits) == [1, 1, 0]
