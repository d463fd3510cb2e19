"""Of a model how much goes where: shares of a recipe's `prune` as units of each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch

from sparserve.compression.pruning.budget import (
    BudgetTooLarge,
    LayerUnits,
    Removal,
    adaptive,
    neurons_first,
    uniform,
    units_of,
    weight,
)
from sparserve.compression.pruning.criteria import Importance
from sparserve.compression.sections import Prune
from sparserve.errors import ConfigError
from sparserve.model.config import ModelConfig
from sparserve.model.weights import layer_shapes


def check_shares(config: ModelConfig, how: Prune, named: str | None = None) -> None:
    """Before anything is read: how much can go depends on sizes alone. `named` is what errors call the share,
    where that is not `prune.ratio` and so on. Raises ConfigError."""
    sizes = (config.layer(index) for index in range(config.num_layers))
    scores = (
        Importance(torch.zeros(own.num_heads).double(), torch.zeros(own.intermediate_size).double())
        for own in sizes
    )
    units = [units_of_layer(config, how, index, own) for index, own in enumerate(scores)]
    allocate(config, how, units, named)


def allocate(
    config: ModelConfig, how: Prune, units: Sequence[LayerUnits], named: str | None = None
) -> list[Removal]:
    """Raises ConfigError."""
    give_out = {"uniform": uniform, "adaptive": adaptive}[how.allocation]

    if how.ratio is not None and how.kinds == "neurons_first":
        give_out = partial(neurons_first, give_out)

    def removals(name: str, share: float, of: int, own: Sequence[LayerUnits]) -> list[Removal]:
        told = f"{named or f'prune.{name}'} is {share:g}"
        asked = round(share * of) or int(share > 0)
        try:
            found = give_out(own, asked)
        except BudgetTooLarge as error:
            most = math.floor(1000 * error.most / of) / 1000  # rounded up it would be refused again
            raise ConfigError(
                f"{told}, and of this model at most {most:g} can be removed: {_what_stays(how, own)}"
            ) from error
        removed = weight(own, found)
        unit = max(layer.neuron_cost for layer in own) or max(layer.head_cost for layer in own)
        if abs(removed - asked) > unit / 2 or (asked and not removed):
            nearest = removed or min(layer.least for layer in own if layer.most)
            raise ConfigError(
                f"{told}, and {removed / of:.4g} would be removed, since heads and neurons go whole: the nearest "
                f"share that can be met is {nearest / of:.4g}"
            )
        return found

    if how.ratio is not None:
        return removals("ratio", how.ratio, config.num_parameters, units)
    heads, neurons = [own.heads_alone() for own in units], [own.neurons_alone() for own in units]
    by_heads = removals("heads", how.heads, sum(own.parameters for own in heads), heads)
    by_neurons = removals("mlp", how.mlp, sum(own.parameters for own in neurons), neurons)
    return [Removal(a.head_steps, b.neurons) for a, b in zip(by_heads, by_neurons, strict=True)]


def units_of_layer(
    config: ModelConfig, how: Prune, index: int, importance: Importance
) -> LayerUnits:
    costs = _costs(config, index)
    return units_of(
        importance,
        num_kv_heads=config.layer(index).num_kv_heads,
        whole_groups=how.head_unit == "groups",
        head_parameters=costs[0],
        kv_head_parameters=costs[1],
        neuron_parameters=costs[2],
    )


def _what_stays(how: Prune, units: Sequence[LayerUnits]) -> str:
    if how.head_unit == "groups":
        return "a KV head and an eighth of the neurons stay in each layer"
    reason = "a query head of each KV head and an eighth of the neurons stay in each layer"
    if any(own.head_cost for own in units) and not any(own.head_steps for own in units):
        reason += ", and each KV head has one query head; head_unit: groups removes both"
    return reason


def _costs(config: ModelConfig, index: int) -> tuple[int, int, int]:
    """Parameters of (a query head, a KV head, a neuron), biases included."""
    size, shapes = config.layer(index), layer_shapes(config, index)

    def of(names: Sequence[str]) -> int:
        return sum(torch.Size(shapes[name]).numel() for name in names if name in shapes)

    return (
        of(("wq", "wo", "bq")) // size.num_heads,
        of(("wk", "wv", "bk", "bv")) // size.num_kv_heads,
        of(("w_gate", "w_up", "w_down")) // size.intermediate_size,
    )
