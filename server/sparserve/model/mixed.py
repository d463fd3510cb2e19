"""Formats for each part of each layer, up to a size or down to a KL.

What a part costs is the KL of the model's output when it alone is rounded, at the lowest choice; what another
choice costs is as much less as its outputs' error is. KLs are added up as if parts did not know of each other,
and rounding is to nearest: what a model loses in the end is predicted roughly, and GPTQ loses less; which
part needs bits more than another is what the sum is for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from sparse_kernels.formats import LayerFormats
from sparse_kernels.weights import LayerTensors
from sparserve.compression.allocation import Option, give_out, ladder, totals
from sparserve.compression.matrix import compress
from sparserve.compression.recipe import Recipe
from sparserve.compression.scaling import column_scales
from sparserve.compression.sections import PARTS, Override, Part
from sparserve.errors import ConfigError
from sparserve.model.compressed_tensors import layer_weights, part_bytes
from sparserve.model.compressing import (
    check_recipe,
    compress_lm_head,
    new_moments,
    stack_inputs,
    told_as_config_error,
)
from sparserve.model.config import ModelConfig
from sparserve.model.effective import effective, effective_head, effective_values
from sparserve.model.loader import LoadedModel
from sparserve.model.packing import layer_tensors
from sparserve.model.stacks import DOWN, STACKS, columns_alike
from sparserve.model.walk import Walk
from sparserve.model.weights import LayerWeights

# Of the calibration's text, and of each of its windows, what KLs are measured on.
WINDOWS, TOKENS = 4, 128
# Adjacent layers get the same formats where there are more than so many.
MOST_BLOCKS = 16
LOGITS_ROWS = 128  # in memory at once

Key = tuple[int, str]  # a block of layers, and a part of them
# (layers walked through, those in all)
OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Allocation:
    recipe: Recipe  # without `mixed`
    kl: float  # predicted, of the LM head too
    bits: float  # of a weight of the layers


def allocate(
    model: LoadedModel,
    recipe: Recipe,
    token_ids: torch.Tensor,
    on_step: OnStep = lambda done, total: None,
) -> Allocation:
    """What `mixed` of the recipe comes to for this model, with the calibration's text token_ids [windows,
    tokens]. Of as many torch threads it is the same each time.

    Raises ConfigError of a target beyond what the choices reach, or that nothing is compressed for; as `compress_layers` of the rest.
    """
    check_recipe(model.config, recipe)
    measured = _measure(model, recipe, token_ids, on_step)
    weights = layer_weights(model.config)
    most_bytes, most_loss = _limits(recipe, measured, weights)
    options = list(measured.options.values())
    places = give_out(options, most_bytes=most_bytes, most_loss=most_loss)
    size, loss = totals(options, places)
    chosen = {
        key: recipe.choices[place] for key, place in zip(measured.options, places, strict=True)
    }
    if all(own.bits == 16 for own in (*chosen.values(), recipe.lm_head)):
        raise ConfigError(
            f"mixed of the recipe {recipe.name} chooses 16 bits for all matrices, and the LM head has as many, so "
            "nothing is compressed; give less target_bits or more target_kl, or the LM head 4 or 8 bits"
        )
    made = _filled_in(recipe, chosen, model.config)
    return Allocation(made, measured.head + loss, 8 * size / weights)


@dataclass(frozen=True, slots=True)
class _Measured:
    head: float  # KL of the LM head as the recipe rounds it
    options: Mapping[Key, Sequence[Option]]  # one for each choice


def _limits(recipe: Recipe, measured: _Measured, weights: int) -> tuple[float, float]:
    """(bytes, loss without the LM head's) at most. Raises ConfigError of what cannot be met."""
    assert recipe.mixed is not None
    options = list(measured.options.values())
    ladders = [ladder(own) for own in options]
    least, greatest = (totals(options, [steps[end] for steps in ladders]) for end in (0, -1))
    if (bits := recipe.mixed.target_bits) is not None:
        most_bytes = bits * weights / 8
        if not least[0] <= most_bytes <= greatest[0]:
            low, high = 8e3 * least[0] / weights, 8e3 * greatest[0] / weights
            raise ConfigError(
                f"mixed.target_bits of the recipe {recipe.name} is {bits}; of its choices this model can have "
                f"{math.ceil(low) / 1e3} to {math.floor(high) / 1e3} bits a weight: give one of these, or other "
                "choices"
            )
        return most_bytes, -math.inf
    kl = recipe.mixed.target_kl
    assert kl is not None
    if kl < measured.head + greatest[1]:
        raise ConfigError(
            f"mixed.target_kl of the recipe {recipe.name} is {kl}; the least that is predicted of its choices "
            f"is {measured.head + greatest[1]:.3g}, {measured.head:.3g} of it the LM head's, with "
            f"{8 * greatest[0] / weights:.2f} bits a weight: give more, or other choices"
        )
    return math.inf, kl - measured.head


def _measure(
    model: LoadedModel, recipe: Recipe, token_ids: torch.Tensor, on_step: OnStep
) -> _Measured:
    """One walk through the layers, from which one more for each part of each block branches off: with it
    rounded in its block, and exact weights from there on."""
    count = model.config.num_layers
    rounding = _Rounding(model, recipe)
    walk = Walk(model, _sample(token_ids))
    branches: dict[Key, Walk] = {}
    errors: dict[Key, torch.Tensor] = {}
    done, total = 0, sum(1 + len(PARTS) * (1 + _block(i, count)) for i in range(count))
    for index in range(count):
        block = _block(index, count)
        layer = layer_tensors(model.weights.layers[index])
        exact = effective(layer)
        for part in PARTS:
            if (block, part) not in branches:
                branches[block, part] = walk.branch()
                errors[block, part] = torch.zeros(len(recipe.choices), dtype=torch.float64)
        rounded: dict[str, LayerWeights] = {}
        with told_as_config_error():
            for part in PARTS:
                if part == "gate_up":
                    walk.add_attention(index, exact)
                rounded[part], own = rounding.of(walk, index, part, layer, exact)
                errors[block, part] += own
        walk.add_feed_forward(exact)
        for (own_block, part), branch in branches.items():
            served = rounded[part] if own_block == block else exact
            branch.add_attention(index, served)
            branch.add_feed_forward(served)
        done += 1 + len(branches)
        on_step(done, total)
    head, *losses = _divergences(model, recipe, walk, list(branches.values()))
    options = {
        key: rounding.options(key[1], loss, errors[key], _layers_of(key[0], count))
        for key, loss in zip(branches, losses, strict=True)
    }
    return _Measured(head, options)


class _Rounding:
    """Parts of layers rounded to nearest, to each choice."""

    def __init__(self, model: LoadedModel, recipe: Recipe) -> None:
        # Of the format alone: the choice of how to round is the same for all.
        self._recipe = recipe.model_copy(update={"quantizer": "rtn", "target": "weights"})
        self._config = model.config
        self._formats = [choice.format() for choice in recipe.choices]
        sizes = self._sizes([0])
        self._lowest = {part: sizes[part].index(min(sizes[part])) for part in PARTS}

    def of(
        self, walk: Walk, index: int, part: str, layer: LayerTensors, exact: LayerWeights
    ) -> tuple[LayerWeights, torch.Tensor]:
        """(the layer with this part rounded to the lowest choice; of each choice the outputs' relative error,
        summed over the part's matrices, float64). `walk` stands where the part's inputs come from."""
        errors = torch.zeros(len(self._formats), dtype=torch.float64)
        changes: dict[str, Any] = {}
        for stack in STACKS:
            if stack.part != part:
                continue
            weight = torch.cat([getattr(layer, name) for name in stack.names])
            moments = new_moments(self._recipe, stack, weight.shape[1])
            name = f"layer {index}: {', '.join(stack.names)}"
            for inputs in stack_inputs(walk, index, stack, exact):
                moments.add(inputs, name)
            scales = torch.ones(weight.shape[1])
            if self._recipe.scale_columns and stack.scaled:
                lowest, alike = (
                    self._formats[self._lowest[part]],
                    columns_alike(stack, self._config, index),
                )
                scales = column_scales(weight, moments.squares, lowest, name, alike)
                weight, moments = weight * scales, moments.divided(scales)
            for place, format in enumerate(self._formats):
                if not format.quantized:
                    continue
                transposed = stack is DOWN
                found = compress(weight, moments, format, self._recipe, name, transposed=transposed)
                errors[place] += found.report.compensated
                if place == self._lowest[part]:
                    values = effective_values(found.matrix, found.basis)
                    values = values.T.contiguous() if transposed else values / scales
                    rows = [len(getattr(exact, field)) for field in stack.fields]
                    changes |= zip(stack.fields, torch.split(values, rows), strict=True)
        return replace(exact, **changes), errors

    def _sizes(self, layers: Iterable[int]) -> dict[str, list[int]]:
        """Bytes of each choice in these layers together, by part."""
        sums: dict[str, list[int]] = {part: [0] * len(self._formats) for part in PARTS}
        for index in layers:
            for place, own in enumerate(self._formats):
                sizes = part_bytes(self._config, index, LayerFormats(own, own, own))
                for part in PARTS:
                    sums[part][place] += sizes[part]
        return sums

    def options(
        self, part: str, loss: float, errors: torch.Tensor, layers: Iterable[int]
    ) -> list[Option]:
        """Of each choice, for these layers, whose errors add up to `errors`; the lowest loses `loss`."""
        lowest = float(errors[self._lowest[part]])
        shares = [own / lowest if lowest else 0.0 for own in errors.tolist()]
        sizes = self._sizes(layers)[part]
        return [Option(size, loss * share) for size, share in zip(sizes, shares, strict=True)]


def _divergences(
    model: LoadedModel, recipe: Recipe, walk: Walk, branches: Sequence[Walk]
) -> list[float]:
    """Mean KL of the next token's distribution to that of `walk`: of `walk` with the LM head rounded, then of
    each branch with the exact one."""
    weights = model.weights
    exact = weights.lm_head.float()
    rounded = compress_lm_head(model, recipe)
    served = exact if rounded is None else effective_head(rounded, torch.float32)
    pairs = [(walk, served), *((branch, exact) for branch in branches)]
    sums = torch.zeros(len(pairs), dtype=torch.float64)
    tokens = walk.x.shape[0] * walk.x.shape[1]

    def log_probabilities(of: Walk, head: torch.Tensor, rows: slice) -> torch.Tensor:
        states = of.norm(of.x.flatten(0, 1)[rows], weights.norm)
        return F.linear(states, head).log_softmax(dim=1)

    for begin in range(0, tokens, LOGITS_ROWS):
        rows = slice(begin, begin + LOGITS_ROWS)
        wanted = log_probabilities(walk, exact, rows)
        likely = wanted.exp()
        for place, (of, head) in enumerate(pairs):
            found = log_probabilities(of, head, rows)
            sums[place] += torch.linalg.vecdot(likely, wanted - found).double().sum()
    # Rounding may leave a little less than nothing.
    return (sums / tokens).clamp_(min=0).tolist()


def _filled_in(recipe: Recipe, chosen: Mapping[Key, Part], config: ModelConfig) -> Recipe:
    """Each part's most frequent choice is that of the recipe, the earlier one of several; others override."""
    changes: dict[str, Any] = {}
    overrides: list[Override] = []
    for part in PARTS:
        by_layer = [chosen[_block(i, config.num_layers), part] for i in range(config.num_layers)]
        counts = Counter(by_layer)
        usual = max(recipe.choices, key=lambda choice: counts[choice])
        changes[part] = usual
        for choice in recipe.choices:
            layers = tuple(i for i, own in enumerate(by_layer) if own == choice)
            if layers and choice != usual:
                overrides.append(Override(layers=layers, **{part: choice}))
    if not any(choice.rank for choice in chosen.values()):
        changes["compensate"] = "none"
    given = {name: getattr(recipe, name) for name in recipe.model_fields_set - {"mixed"}}
    return Recipe(**{**given, **changes, "overrides": tuple(overrides)})


def _sample(token_ids: torch.Tensor) -> torch.Tensor:
    """Windows evenly spread over those of the calibration, the beginning of each."""
    count = min(WINDOWS, len(token_ids))
    return token_ids[[i * len(token_ids) // count for i in range(count)], :TOKENS]


def _block(index: int, layers: int) -> int:
    """Of the layer with this index, of so many."""
    return index // -(-layers // MOST_BLOCKS)


def _layers_of(block: int, layers: int) -> list[int]:
    """Those in a block."""
    return [index for index in range(layers) if _block(index, layers) == block]
