"""A model with fewer heads and neurons: what `prune` of a recipe makes of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

from sparserve.compression.pruning.budget import (
    BudgetTooLarge,
    LayerUnits,
    Removal,
    adaptive,
    uniform,
    units_of,
)
from sparserve.compression.pruning.criteria import CRITERIA, LayerMatrices
from sparserve.compression.pruning.restore import Restored, least_squares
from sparserve.compression.pruning.statistics import LayerStatistics
from sparserve.compression.sections import Prune
from sparserve.compression.statistics import InputMoments
from sparserve.errors import ConfigError
from sparserve.model.config import LayerSize, ModelConfig
from sparserve.model.layers_at_use import LayersAtUse
from sparserve.model.loader import LoadedModel
from sparserve.model.walk import Walk, activations
from sparserve.model.weights import LayerWeights, layer_shapes

# One window of so many is held out, to see whether a matrix is nearer to what it was when it is restored.
HELD_OUT = 4

# (layers done, layers in all, of all passes)
OnLayer = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Units that stay, in their order; int64."""

    heads: torch.Tensor
    kv_heads: torch.Tensor
    neurons: torch.Tensor

    @property
    def size(self) -> LayerSize:
        return LayerSize(len(self.heads), len(self.kv_heads), len(self.neurons))


@dataclass(frozen=True, slots=True, eq=False)
class PrunedLayer:
    """Of the report."""

    size: LayerSize
    output: Restored | None  # of what was restored, accepted or not
    down: Restored | None


@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    model: LoadedModel
    layers: Sequence[PrunedLayer]
    parameters: int  # that were removed


def prune(
    model: LoadedModel,
    how: Prune,
    token_ids: torch.Tensor,
    on_layer: OnLayer = lambda done, total: None,
) -> Pruned:
    """The pruned model, whose layers are cut when they are asked for. token_ids [windows, tokens] are the
    calibration's. With as many torch threads it is the same each time.

    Raises ConfigError of shares that leave too little.
    """
    passes = 1 if how.restore == "none" else 2
    count = model.config.num_layers
    kept = _choose(model, how, token_ids, lambda done: on_layer(done, passes * count))
    config = model.config.pruned([own.size for own in kept])
    layers = PrunedLayers(model.weights.layers, kept, model.config.head_dim)
    pruned = replace(model, config=config, weights=replace(model.weights, layers=layers))
    removed = model.config.num_parameters - config.num_parameters
    report = [PrunedLayer(own.size, None, None) for own in kept]
    if how.restore == "least_squares":
        if len(token_ids) < HELD_OUT:
            raise ConfigError(
                f"restoring needs {HELD_OUT} windows of text at least, one of them held out, and the calibration "
                f"has {len(token_ids)}; give more text, or prune.restore none"
            )
        report = _restore(model, layers, token_ids, lambda done: on_layer(count + done, 2 * count))
    return Pruned(pruned, report, removed)


class PrunedLayers(LayersAtUse[LayerWeights]):
    """The layers of a model, cut at their use; restored matrices are kept."""

    def __init__(self, layers: Sequence[LayerWeights], kept: Sequence[Kept], head_dim: int) -> None:
        self._layers, self.kept, self._head_dim = layers, kept, head_dim
        self._restored: dict[int, dict[str, torch.Tensor]] = {}

    def restore(self, index: int, field: str, weight: torch.Tensor) -> None:
        self._restored.setdefault(index, {})[field] = weight

    def __len__(self) -> int:
        return len(self._layers)

    def layer(self, index: int) -> LayerWeights:
        layer = cut(self._layers[index], self.kept[index], self._head_dim)
        own = self._restored.get(index, {})
        return replace(layer, **{name: t.to(layer.wo.dtype) for name, t in own.items()})


def cut(layer: LayerWeights, kept: Kept, head_dim: int) -> LayerWeights:
    """`layer` with what is `kept` alone."""

    def of_heads(heads: torch.Tensor) -> torch.Tensor:
        return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()

    q, kv, neurons = of_heads(kept.heads), of_heads(kept.kv_heads), kept.neurons
    rows = {
        "wq": q, "wk": kv, "wv": kv, "bq": q, "bk": kv, "bv": kv, "w_gate": neurons, "w_up": neurons
    }  # fmt: skip
    columns = {"wo": q, "w_down": neurons}
    changes = {}
    for field in fields(layer):
        own = getattr(layer, field.name)
        if own is not None and field.name in rows:
            changes[field.name] = own[rows[field.name]]
        elif field.name in columns:
            changes[field.name] = own[:, columns[field.name]]
    return replace(layer, **changes)


def _choose(
    model: LoadedModel, how: Prune, token_ids: torch.Tensor, on_layer: Callable[[int], None]
) -> list[Kept]:
    """One walk through the whole model, then the budget over all layers."""
    config = model.config
    generator = torch.Generator().manual_seed(how.seed)
    walk, units = Walk(model, token_ids), []
    for index in range(config.num_layers):
        layer = _exact(model.weights.layers[index])
        seen = _statistics(walk, index, layer)
        matrices = LayerMatrices(layer.wq, layer.wo, layer.w_gate, layer.w_up, layer.w_down)
        importance = CRITERIA[how.criterion](matrices, seen, generator)
        size, costs = config.layer(index), _costs(config, index)
        units.append(
            units_of(
                importance,
                num_kv_heads=size.num_kv_heads,
                whole_groups=how.head_unit == "groups",
                head_parameters=costs[0],
                kv_head_parameters=costs[1],
                neuron_parameters=costs[2],
            )
        )
        on_layer(index + 1)
    removals = _allocate(config, how, units)
    return [
        _kept(config.layer(index), own, removal)
        for index, (own, removal) in enumerate(zip(units, removals, strict=True))
    ]


def _statistics(walk: Walk, index: int, layer: LayerWeights) -> LayerStatistics:
    """Of layer `index`; the walk goes through it."""
    size = walk.config.layer(index)
    seen = LayerStatistics.zeros(size.num_heads, walk.config.head_dim, size.intermediate_size)
    for own in walk.x:
        heads = walk.heads(index, layer, walk.norm(own, layer.attn_norm))
        seen.add_heads(heads, layer.wo)
        own += F.linear(heads, layer.wo, layer.bo)
        made = activations(layer, walk.norm(own, layer.mlp_norm))
        seen.neurons.add(made)
        own += F.linear(made, layer.w_down)
    return seen


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


def _allocate(config: ModelConfig, how: Prune, units: Sequence[LayerUnits]) -> list[Removal]:
    """Raises ConfigError."""
    give_out = {"uniform": uniform, "adaptive": adaptive}[how.allocation]

    def removals(name: str, share: float, of: int, own: Sequence[LayerUnits]) -> list[Removal]:
        try:
            return give_out(own, round(share * of))
        except BudgetTooLarge as error:
            raise ConfigError(
                f"prune.{name} is {share:g}, and of this model at most {error.most / of:.3g} can be removed: a KV "
                "head and an eighth of the neurons stay in each layer"
            ) from error

    if how.ratio is not None:
        return removals("ratio", how.ratio, config.num_parameters, units)
    heads, neurons = [own.heads_alone() for own in units], [own.neurons_alone() for own in units]
    by_heads = removals("heads", how.heads, sum(own.parameters for own in heads), heads)
    by_neurons = removals("mlp", how.mlp, sum(own.parameters for own in neurons), neurons)
    return [Removal(a.head_steps, b.neurons) for a, b in zip(by_heads, by_neurons, strict=True)]


def _kept(size: LayerSize, units: LayerUnits, removal: Removal) -> Kept:
    gone = {head for step in units.head_steps[: removal.head_steps] for head in step.heads}
    heads = [head for head in range(size.num_heads) if head not in gone]
    group = size.num_heads // size.num_kv_heads
    return Kept(
        torch.tensor(heads),
        torch.tensor(sorted({head // group for head in heads})),
        units.neurons[removal.neurons :].sort().values,
    )


def _restore(
    model: LoadedModel,
    layers: PrunedLayers,
    token_ids: torch.Tensor,
    on_layer: Callable[[int], None],
) -> list[PrunedLayer]:
    """A walk through the pruned model: each matrix is fitted to what it would make, whole, of the inputs that
    come out of all that is pruned before it."""
    walk, report = Walk(model, token_ids), []
    head_dim = model.config.head_dim
    for index, kept in enumerate(layers.kept):
        whole = _exact(model.weights.layers[index])
        heads = (kept.heads[:, None] * head_dim + torch.arange(head_dim)).flatten()

        def heads_of(
            own: torch.Tensor, layer: LayerWeights = whole, at: int = index
        ) -> torch.Tensor:
            return walk.heads(at, layer, walk.norm(own, layer.attn_norm))

        def neurons_of(own: torch.Tensor, layer: LayerWeights = whole) -> torch.Tensor:
            return activations(layer, walk.norm(own, layer.mlp_norm))

        output = _fitted(walk, whole.wo, heads, heads_of, f"layer {index}: output")
        if output is not None and output.restored < output.removed:
            layers.restore(index, "wo", output.weight)
        served = _exact(layers[index])
        for own in walk.x:
            own += F.linear(heads_of(own)[:, heads], served.wo, served.bo)
        down = _fitted(walk, whole.w_down, kept.neurons, neurons_of, f"layer {index}: down")
        if down is not None and down.restored < down.removed:
            layers.restore(index, "w_down", down.weight)
        walk.add_feed_forward(_exact(layers[index]))
        report.append(PrunedLayer(kept.size, output, down))
        on_layer(index + 1)
    return report


def _fitted(
    walk: Walk,
    weight: torch.Tensor,
    kept: torch.Tensor,
    inputs_of: Callable[[torch.Tensor], torch.Tensor],
    name: str,
) -> Restored | None:
    """None where nothing was removed."""
    if len(kept) == weight.shape[1]:
        return None
    fitted, held_out = (InputMoments.full(weight.shape[1]) for _ in range(2))
    for window, own in enumerate(walk.x):
        moments = held_out if window % HELD_OUT == HELD_OUT - 1 else fitted
        moments.add(inputs_of(own), name)
    return least_squares(weight, kept, fitted.sums, held_out.sums)


def _exact(layer: LayerWeights) -> LayerWeights:
    """In float32."""
    tensors = {field.name: getattr(layer, field.name) for field in fields(layer)}
    return replace(layer, **{name: t.float() for name, t in tensors.items() if t is not None})
