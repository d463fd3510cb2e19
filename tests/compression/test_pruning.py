"""Which units matter, how many go, what the rest makes up for; against plain loops in float64."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparserve.compression.pruning.budget import (
    BudgetTooLarge,
    LayerUnits,
    adaptive,
    neurons_first,
    uniform,
    units_of,
    weight,
)
from sparserve.compression.pruning.criteria import CRITERIA, Importance, LayerMatrices
from sparserve.compression.pruning.restore import RIDGE, restore
from sparserve.compression.pruning.statistics import LayerStatistics

HEADS, HEAD_DIM, HIDDEN, NEURONS = 4, 3, 7, 11
HEAD, KV_HEAD, NEURON = 40, 30, 21  # parameters


def random_layer(generator: torch.Generator) -> LayerMatrices:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return LayerMatrices(
        random(HEADS * HEAD_DIM, HIDDEN),
        random(HIDDEN, HEADS * HEAD_DIM),
        random(NEURONS, HIDDEN),
        random(NEURONS, HIDDEN),
        random(HIDDEN, NEURONS),
    )


def windows_of(width: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Three of unlike lengths."""
    return [torch.randn(tokens, width, generator=generator) for tokens in (2, 5, 9)]


def test_scores_are_those_of_plain_loops():
    generator = torch.Generator().manual_seed(0)
    layer = random_layer(generator)
    heads, neurons = windows_of(HEADS * HEAD_DIM, generator), windows_of(NEURONS, generator)
    seen = LayerStatistics.zeros(HEADS, HEAD_DIM, NEURONS)
    for z, a in zip(heads, neurons, strict=True):
        seen.add_heads(z, layer.wo)
        seen.neurons.add(a)

    def over_windows(of, windows):
        return sum(sum(map(of, own)) / len(own) for own in windows) / len(windows)

    found = {name: own(layer, seen, generator) for name, own in CRITERIA.items()}
    wo, down = layer.wo.double(), layer.w_down.double()
    for head in range(HEADS):
        part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        through = over_windows(lambda z, p=part: (wo[:, p] @ z[p].double()).abs().sum(), heads)
        for name in ("amp", "amp_w"):
            assert float(found[name].heads[head]) == pytest.approx(float(through), rel=1e-5)
        square = over_windows(lambda z, p=part: z[p].double().square(), heads)
        mean = over_windows(lambda z, p=part: z[p].double(), heads)
        wanda = (wo[:, part].abs().mean(dim=0) * square.sqrt()).mean()
        assert float(found["wanda"].heads[head]) == pytest.approx(float(wanda), rel=1e-6)
        flap = ((square - mean**2) * wo[:, part].square().sum(dim=0)).square().mean()
        assert float(found["flap"].heads[head]) == pytest.approx(float(flap), rel=1e-6)
    for i in range(NEURONS):
        absolute = over_windows(lambda a, i=i: a[i].double().abs(), neurons)
        square = over_windows(lambda a, i=i: a[i].double().square(), neurons)
        mean = over_windows(lambda a, i=i: a[i].double(), neurons)
        for name, expected in {
            "amp": absolute,
            "amp_w": absolute * down[:, i].abs().sum(),
            "wanda": down[:, i].abs().mean() * square.sqrt(),
            "flap": (square - mean**2) * down[:, i].square().sum(),
        }.items():
            assert float(found[name].neurons[i]) == pytest.approx(float(expected), rel=1e-6)


def test_random_is_of_its_seed():
    layer, seen = random_layer(torch.Generator()), LayerStatistics.zeros(HEADS, HEAD_DIM, NEURONS)
    one, same, other = (
        CRITERIA["random"](layer, seen, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one.neurons, same.neurons)
    assert torch.equal(one.heads, same.heads)
    assert not torch.equal(one.neurons, other.neurons)


def units(heads: list[float], neurons: list[float], *, whole_groups: bool = True) -> LayerUnits:
    """Two query heads to a KV head."""
    return units_of(
        Importance(
            torch.tensor(heads, dtype=torch.float64), torch.tensor(neurons, dtype=torch.float64)
        ),
        num_kv_heads=len(heads) // 2,
        whole_groups=whole_groups,
        head_parameters=HEAD,
        kv_head_parameters=KV_HEAD,
        neuron_parameters=NEURON,
    )


def test_heads_go_by_groups_or_one_of_each_group():
    own = units([3, 5, 0, 9, 1, 2], [2, 0, 1])
    assert [step.heads for step in own.head_steps] == [(4, 5), (0, 1)]  # means 1.5, 4, 4.5
    assert [step.score for step in own.head_steps] == [1.5, 4]
    assert own.head_cost == 2 * HEAD + KV_HEAD
    assert own.neurons.tolist() == [1, 2, 0]
    own = units([3, 5, 0, 9, 1, 2], [2, 0, 1], whole_groups=False)
    assert [step.heads for step in own.head_steps] == [(0, 2, 4)]
    assert own.head_cost == 3 * HEAD


layer_lists = st.lists(
    st.tuples(
        st.integers(1, 6), st.integers(1, 200), st.integers(0, 2**31), st.sampled_from([True, True, False])
    ),
    min_size=1,
    max_size=6,
)  # fmt: skip


def random_units(groups: int, neurons: int, seed: int, whole_groups: bool = True) -> LayerUnits:
    generator = torch.Generator().manual_seed(seed)
    return units(
        torch.rand(2 * groups, generator=generator).tolist(),
        torch.rand(neurons, generator=generator).tolist(),
        whole_groups=whole_groups,
    )


@pytest.mark.parametrize(
    "give_out",
    [uniform, adaptive, partial(neurons_first, uniform), partial(neurons_first, adaptive)],
)
@given(sizes=layer_lists, share=st.floats(0, 1))
def test_a_budget_is_met_up_to_half_a_unit_and_leaves_each_layer_something(give_out, sizes, share):
    layers = [random_units(*own) for own in sizes]
    most = sum(own.most for own in layers)
    asked = round(share * most)
    removals = give_out(layers, asked)
    for own, removal in zip(layers, removals, strict=True):
        assert 0 <= removal.head_steps <= len(own.head_steps)
        assert 0 <= removal.neurons <= own.most_neurons < len(own.neurons)
    step = max(own.head_cost for own in layers)
    mixes = sum(own.neurons_alone().most for own in layers) >= 2 * step
    assert abs(weight(layers, removals) - asked) <= (NEURON if mixes else step + NEURON) / 2
    with pytest.raises(BudgetTooLarge):
        give_out(layers, most + 1)


@pytest.mark.parametrize("give_out", [uniform, adaptive])
@given(sizes=layer_lists, share=st.floats(0, 1))
def test_heads_alone_meet_a_budget_up_to_half_a_step(give_out, sizes, share):
    layers = [random_units(*own).heads_alone() for own in sizes]
    asked = round(share * sum(own.most for own in layers))
    removals = give_out(layers, asked)
    assert abs(weight(layers, removals) - asked) <= max(own.head_cost for own in layers) / 2
    assert all(a.head_steps <= len(b.head_steps) for a, b in zip(removals, layers, strict=True))


def test_neurons_stay_for_heads_that_go_whole():
    layers = [random_units(3, 80, seed) for seed in range(4)]
    neurons = sum(own.neurons_alone().most for own in layers)
    asked = neurons + layers[0].head_cost // 3
    removals = neurons_first(uniform, layers, asked)
    assert sum(own.head_steps for own in removals) == 1
    assert abs(weight(layers, removals) - asked) <= NEURON / 2


def test_what_a_layer_has_no_room_for_is_taken_of_others():
    heads = [random_units(groups, 9, 0).heads_alone() for groups in (4, 1)]
    assert [own.head_steps for own in uniform(heads, 3 * heads[0].head_cost)] == [3, 0]


@given(share=st.floats(0.01, 0.8))
def test_layers_alike_lose_alike_and_all_together_what_is_asked(share):
    layers = [random_units(8, 150, seed) for seed in range(5)]
    asked = round(share * sum(own.parameters for own in layers))
    removals = uniform(layers, asked)
    assert len({own.head_steps for own in removals}) == 1
    assert max(own.neurons for own in removals) - min(own.neurons for own in removals) <= 1
    assert abs(weight(layers, removals) - asked) <= NEURON / 2


def test_heads_alone_are_rounded_over_layers():
    layers = [random_units(3, 10, seed).heads_alone() for seed in range(10)]
    removals = uniform(layers, round(0.2 * sum(own.parameters for own in layers)))
    steps = [own.head_steps for own in removals]
    assert sum(steps) == 6
    assert all(1 <= sum(steps[i : i + 3]) <= 2 for i in range(8))  # all over the depth
    assert {own.neurons for own in removals} == {0}


def test_neurons_go_first_and_heads_only_for_what_is_left():
    layers = [random_units(3, 16, seed) for seed in range(4)]
    most = sum(own.neurons_alone().most for own in layers)
    removals = neurons_first(uniform, layers, most // 2)
    assert {own.head_steps for own in removals} == {0}
    assert {own.neurons for own in removals} == {7}
    step = layers[0].head_cost
    removals = neurons_first(uniform, layers, most + 3 * step)
    assert sum(own.head_steps for own in removals) == 3
    assert {own.neurons for own in removals} == {14}


def test_adaptive_takes_what_stands_lowest_in_its_layer():
    flat = units([1, 1, 1, 1], [10.0] * 8 + [11.0] * 8)
    steep = units([1, 1, 1, 1], [0.0] * 2 + [10.0] * 14)
    removals = adaptive([flat.neurons_alone(), steep.neurons_alone()], 2 * NEURON)
    assert [own.neurons for own in removals] == [0, 2]


def with_ones(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x, torch.ones(len(x), 1)), dim=1).double()


def moments(x: torch.Tensor) -> torch.Tensor:
    return with_ones(x).T @ with_ones(x)


def correlated(rows: int, generator: torch.Generator) -> torch.Tensor:
    """Eight inputs of four sources, with means of their own."""
    mixed = torch.randn(4, 8, generator=torch.Generator().manual_seed(4))
    noise = 0.05 * torch.randn(rows, 8, generator=generator)
    return torch.randn(rows, 4, generator=generator) @ mixed + noise + torch.arange(8)


KEPT, GONE = torch.tensor([0, 1, 3, 4, 6, 7]), [2, 5]


def error(weight, x, served, bias) -> float:
    """Of outputs, written out."""
    lost = x @ weight.T - x[:, KEPT] @ served.T - bias
    return float(lost.square().sum() / (x @ weight.T).square().sum())


def test_least_squares_makes_up_for_what_the_rest_knows():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 8, generator=generator)
    x, held_out = correlated(400, generator), correlated(200, generator)
    found = restore(weight, KEPT, moments(x), moments(held_out), "least_squares")
    plain, none = weight[:, KEPT], torch.zeros(5)
    assert found.removed == pytest.approx(error(weight, held_out, plain, none), rel=1e-4)
    own = error(weight, held_out, found.weight, found.bias)
    assert found.restored == pytest.approx(own, rel=1e-4)
    by_mean = error(weight, held_out, plain, x[:, GONE].mean(dim=0) @ weight[:, GONE].T)
    assert found.restored < 0.1 * by_mean  # four sources carry all: six inputs hold them
    assert by_mean < 0.5 * found.removed
    # Ridge regression on centred inputs, as rows of one system; the bias is not shrunk.
    ridge = (RIDGE * float(x.double().var(dim=0, correction=0).mean()) * len(x)) ** 0.5
    rows = torch.cat((with_ones(x[:, KEPT]), torch.eye(7).double() * ridge))
    rows[-1] = 0
    near = torch.cat((plain.T.double() * ridge, torch.zeros(1, 5)))  # to what it was
    wanted = torch.cat(((x @ weight.T).double(), near))
    solution = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(found.weight.double(), solution[:, :-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.bias.double(), solution[:, -1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", ["bias", "least_squares"])
def test_what_never_changes_is_a_bias(how):
    generator = torch.Generator().manual_seed(5)
    weight, x = torch.randn(5, 8, generator=generator), torch.randn(300, 8, generator=generator)
    x[:, GONE] = torch.tensor([2.0, -3.0])
    found = restore(weight, KEPT, moments(x[:200]), moments(x[200:]), how)
    if found.weight is not None:
        torch.testing.assert_close(found.weight, weight[:, KEPT])
    expected = weight[:, GONE] @ torch.tensor([2.0, -3.0])
    torch.testing.assert_close(found.bias, expected, rtol=1e-4, atol=1e-4)
    assert found.restored < 1e-9 < found.removed


@pytest.mark.parametrize("how", ["bias", "least_squares"])
def test_what_does_not_hold_elsewhere_is_left_out(how):
    generator = torch.Generator().manual_seed(6)
    weight, x = torch.randn(5, 8, generator=generator), torch.randn(300, 8, generator=generator)
    other = x.clone()
    x[:, GONE] += 1
    other[:, GONE] -= 1
    found = restore(weight, KEPT, moments(x), moments(other), how)
    assert (found.weight, found.bias) == (None, None)
    assert found.restored == found.removed > 0


def test_inputs_that_were_never_there_are_restored_by_nothing():
    weight, zeros = torch.randn(5, 8), torch.zeros(20, 8)
    found = restore(weight, KEPT, moments(zeros), moments(zeros), "least_squares")
    assert (found.weight, found.bias) == (None, None)
    assert found.restored == found.removed == 0


def test_a_layer_without_importance_still_loses_its_share():
    own = replace(units([0, 0, 0, 0], [0.0] * 20))
    removal = adaptive([own], own.most)[0]
    assert (removal.head_steps, removal.neurons) == (1, own.most_neurons)
    assert own.most_neurons == 20 - max(1, round(20 / 8))
    assert math.isclose(own.parameters, 2 * (2 * HEAD + KV_HEAD) + 20 * NEURON)
