"""How many heads and neurons each layer loses, for a number of parameters in all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from sparserve.compression.pruning.criteria import Importance

# Of a layer's neurons: an allocation by importance alone may empty a layer, which then passes nothing on.
LEAST_NEURONS = 1 / 8
GOLDEN = (5**0.5 - 1) / 2


class BudgetTooLarge(ValueError):
    """More is asked for than may be removed; `most` parameters may."""

    def __init__(self, asked: int, most: int) -> None:
        super().__init__(f"{asked} parameters are to be removed, and at most {most} may be")
        self.most = most


# (layers, parameters to remove) -> of each layer what goes.
GiveOut = Callable[[Sequence["LayerUnits"], int], list["Removal"]]


@dataclass(frozen=True, slots=True)
class HeadStep:
    """Query heads that are removed at once."""

    heads: tuple[int, ...]
    score: float


@dataclass(frozen=True, slots=True, eq=False)
class LayerUnits:
    """What a layer can lose, in this order."""

    head_steps: Sequence[HeadStep]  # all but the last
    head_cost: int  # parameters of a step
    neurons: torch.Tensor  # int64 [neurons], by rising importance
    neuron_scores: torch.Tensor  # float64, in this order
    neuron_cost: int

    @property
    def most_neurons(self) -> int:
        """That may be removed."""
        return max(0, len(self.neurons) - max(1, round(LEAST_NEURONS * len(self.neurons))))

    @property
    def parameters(self) -> int:
        """Of all that a budget is a share of: the last head step and neurons stay, and count."""
        steps = len(self.head_steps) + 1 if self.head_cost else 0
        return steps * self.head_cost + len(self.neurons) * self.neuron_cost

    @property
    def most(self) -> int:
        return len(self.head_steps) * self.head_cost + self.most_neurons * self.neuron_cost

    @property
    def least(self) -> int:
        """Of a layer that can lose anything."""
        return self.neuron_cost if self.most_neurons else self.head_cost

    def heads_alone(self) -> LayerUnits:
        return replace(
            self, neurons=self.neurons[:0], neuron_scores=self.neuron_scores[:0], neuron_cost=0
        )

    def neurons_alone(self) -> LayerUnits:
        return replace(self, head_steps=(), head_cost=0)


@dataclass(frozen=True, slots=True)
class Removal:
    """Of a layer: the first so many of its units."""

    head_steps: int = 0
    neurons: int = 0


def units_of(
    importance: Importance,
    *,
    num_kv_heads: int,
    whole_groups: bool,
    head_parameters: int,
    kv_head_parameters: int,
    neuron_parameters: int,
) -> LayerUnits:
    """A step of heads is a KV head with all its query heads, or the least important query head of every
    group, which leaves the KV cache as it is. Parameters are those of one query head, one KV head, one neuron."""
    groups = importance.heads.view(num_kv_heads, -1)
    size = groups.shape[1]
    if whole_groups:
        means = groups.mean(dim=1)
        order = means.argsort(stable=True).tolist()
        steps = [
            HeadStep(tuple(range(group * size, (group + 1) * size)), float(means[group]))
            for group in order[:-1]
        ]
        cost = size * head_parameters + kv_head_parameters
    else:
        ranked = groups.sort(dim=1, stable=True)
        steps = [
            HeadStep(
                tuple(
                    group * size + int(ranked.indices[group, place])
                    for group in range(num_kv_heads)
                ),
                float(ranked.values[:, place].mean()),
            )
            for place in range(size - 1)
        ]
        cost = num_kv_heads * head_parameters
    neurons = importance.neurons.sort(stable=True)
    return LayerUnits(steps, cost, neurons.indices, neurons.values, neuron_parameters)


def uniform(layers: Sequence[LayerUnits], parameters: int) -> list[Removal]:
    """The same share of every layer, heads rounded to whole steps and neurons making up for it, so that all
    together lose `parameters` up to half a unit, the smallest there is (AMP's rule, with what a head and a neuron
    really weigh). What a layer has no room for is taken of the others.

    Raises BudgetTooLarge.
    """
    _check(layers, parameters)
    if not any(own.neuron_cost for own in layers):
        alone = [(len(own.head_steps), own.head_cost, 0, own.parameters) for own in layers]
        return [Removal(count) for count in _evenly(alone, parameters)]
    share = parameters / sum(own.parameters for own in layers)
    steps = (min(round(share * (len(own.head_steps) + 1)), len(own.head_steps)) for own in layers)
    heads = _with_room_for_neurons(uniform, layers, parameters, [Removal(own) for own in steps])
    neurons = [
        (own.most_neurons, own.neuron_cost, head.head_steps * own.head_cost, own.parameters)
        for own, head in zip(layers, heads, strict=True)
    ]
    counts = _evenly(neurons, parameters - weight(layers, heads))
    return [Removal(a.head_steps, count) for a, count in zip(heads, counts, strict=True)]


def _evenly(kinds: Sequence[tuple[int, int, int, int]], parameters: int) -> list[int]:
    """Of each layer's units of a kind, (how many may go, cost, parameters that are gone already, parameters of the
    layer): so many that layers come as near as they can to the same share, and weigh `parameters` up to half a unit."""
    queue = sorted(
        # Layers alike take turns all over the depth: multiples of the golden ratio are spread evenly.
        ((gone + (unit + 0.5) * cost) / of, index * GOLDEN % 1, index)
        for index, (most, cost, gone, of) in enumerate(kinds)
        for unit in range(most)
    )
    counts, left = [0] * len(kinds), parameters
    for _, _, index in queue:
        cost = kinds[index][1]
        if left >= cost / 2:
            counts[index] += 1
            left -= cost
    return counts


def adaptive(layers: Sequence[LayerUnits], parameters: int) -> list[Removal]:
    """Units of all layers by their scores' standing in their own layer and kind, the lowest first, as many
    as weigh `parameters` up to half a unit, the smallest there is (FLAP's rule, arXiv 2312.11983). No layer loses more
    than `uniform` could take of it.

    Raises BudgetTooLarge.
    """
    _check(layers, parameters)
    queue: list[tuple[float, int, bool, int]] = []  # (standing, layer, is a head step, cost)
    for index, own in enumerate(layers):
        scores = torch.tensor([step.score for step in own.head_steps], dtype=torch.float64)
        queue += [(z, index, True, own.head_cost) for z in _standing(scores)]
        queue += [
            (z, index, False, own.neuron_cost)
            for z in _standing(own.neuron_scores)[: own.most_neurons]
        ]
    counts = {(index, kind): 0 for index in range(len(layers)) for kind in (True, False)}
    left = parameters
    for _, index, is_heads, cost in sorted(queue):
        if left >= cost / 2:  # of what is larger the next may still fit
            counts[index, is_heads] += 1
            left -= cost
    found = [Removal(counts[i, True], counts[i, False]) for i in range(len(layers))]
    if not any(own.neuron_cost and own.head_cost for own in layers):
        return found
    # A head that did not fit exactly is made up for by neurons.
    heads = _with_room_for_neurons(
        adaptive, layers, parameters, [Removal(own.head_steps) for own in found]
    )
    return _and_neurons(adaptive, layers, parameters, heads)


def neurons_first(
    give_out: GiveOut, layers: Sequence[LayerUnits], parameters: int
) -> list[Removal]:
    """Neurons alone as far as they go, and heads for the rest, each kind by `give_out`. Of neurons so many stay as make
    up for heads that go whole.

    Raises BudgetTooLarge.
    """
    _check(layers, parameters)
    none = [Removal()] * len(layers)
    heads = _with_room_for_neurons(give_out, layers, parameters, none)
    return _and_neurons(give_out, layers, parameters, heads)


def weight(layers: Sequence[LayerUnits], removals: Sequence[Removal]) -> int:
    """Parameters that go."""
    return sum(
        removal.head_steps * own.head_cost + removal.neurons * own.neuron_cost
        for own, removal in zip(layers, removals, strict=True)
    )


def _with_room_for_neurons(
    give_out: GiveOut, layers: Sequence[LayerUnits], parameters: int, wanted: list[Removal]
) -> list[Removal]:
    """`wanted`, which is of heads alone, where neurons can make up for what is missing; else as near to it as they
    can."""
    heads = [own.heads_alone() for own in layers]
    step = max(own.head_cost for own in layers)
    low = parameters - sum(own.neurons_alone().most for own in layers)
    most = sum(own.most for own in heads)
    tries = [wanted] + [
        give_out(heads, min(max(amount, 0), most))
        for amount in (low, low + step, parameters - step, parameters)
        if step
    ]

    half = max(own.neuron_cost for own in layers) // 2

    def misses(removals: list[Removal]) -> tuple[int, int]:
        own = weight(layers, removals)
        return max(low - own, own - parameters, half), abs(own - weight(layers, wanted))

    return min(tries, key=misses)


def _and_neurons(
    give_out: GiveOut, layers: Sequence[LayerUnits], parameters: int, heads: list[Removal]
) -> list[Removal]:
    neurons = [own.neurons_alone() for own in layers]
    rest = min(max(parameters - weight(layers, heads), 0), sum(own.most for own in neurons))
    found = give_out(neurons, rest) if rest else heads  # without neurons
    return [Removal(a.head_steps, b.neurons) for a, b in zip(heads, found, strict=True)]


def _standing(scores: torch.Tensor) -> list[float]:
    """How many standard deviations each is from the mean."""
    if len(scores) < 2:
        return [0.0] * len(scores)
    spread = float(scores.std()) or 1.0
    found: list[float] = ((scores - scores.mean()) / spread).tolist()
    return found


def _check(layers: Sequence[LayerUnits], parameters: int) -> None:
    most = sum(own.most for own in layers)
    if parameters > most:
        raise BudgetTooLarge(parameters, most)
