"""A model with fewer heads and neurons: what `prune` of a recipe makes of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

from sparse_kernels.weights import NonFiniteWeights
from sparserve.compression.pruning.budget import LayerUnits, Removal
from sparserve.compression.pruning.criteria import CRITERIA, LayerMatrices
from sparserve.compression.pruning.restore import Restored, restore
from sparserve.compression.pruning.statistics import LayerStatistics
from sparserve.compression.sections import Prune
from sparserve.compression.statistics import InputMoments, NonFiniteInputs
from sparserve.errors import ConfigError
from sparserve.model.compressed_checkpoint import AddedBias
from sparserve.model.compressing import told_as_config_error
from sparserve.model.config import LayerSize, ModelConfig
from sparserve.model.layers_at_use import LayersAtUse
from sparserve.model.loader import LoadedModel
from sparserve.model.pruning_shares import allocate, check_shares, units_of_layer
from sparserve.model.walk import Walk, activations
from sparserve.model.weights import LayerWeights

# One window of so many is held out, to see whether a matrix is nearer to what it was when it is restored.
HELD_OUT = 4
# Outputs of a token, of the mean of its window: what is smaller counts no more.
SMALLEST = 0.01
# Fields of LayerWeights -> what CompressionInfo calls them.
BIASES: dict[str, AddedBias] = {"bo": "output", "bd": "down"}

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
    output: Restored | None  # of what inputs were removed of, if it was to be restored
    down: Restored | None


@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    model: LoadedModel
    layers: Sequence[PrunedLayer]
    parameters: int  # that it has fewer, with those of added biases
    added_biases: tuple[AddedBias, ...]  # of all layers, where any was restored by one


@told_as_config_error()
def prune(
    model: LoadedModel,
    how: Prune,
    token_ids: torch.Tensor | None,
    on_layer: OnLayer = lambda done, total: None,
    seen: Sequence[LayerStatistics] | None = None,
) -> Pruned:
    """The pruned model, whose layers are cut when they are asked for. token_ids [windows, tokens] are the
    calibration's, where `how` needs a text; `seen` is what `statistics_of` found on them, where it was asked. With as
    many torch threads it is the same each time.

    Raises ConfigError of shares that leave too little, and as `statistics_of`.
    """
    check_shares(model.config, how)
    passes = 1 if how.restore == "none" else 2
    count = model.config.num_layers
    if seen is None and not how.needs_text:
        seen = [_nothing_seen(model.config, index) for index in range(count)]
    elif seen is None:
        assert token_ids is not None
        seen = statistics_of(model, token_ids, lambda done: on_layer(done, passes * count))
    kept = _choose(model, how, seen)
    config = model.config.pruned([own.size for own in kept])
    layers = PrunedLayers(model.weights.layers, kept, model.config.head_dim)
    report = [PrunedLayer(own.size, None, None) for own in kept]
    if how.restore != "none":
        assert token_ids is not None
        if len(token_ids) < HELD_OUT:
            raise ConfigError(
                f"restoring needs {HELD_OUT} windows of text at least, one of them held out, and the calibration "
                f"has {len(token_ids)}; give more text, or prune.restore none"
            )
        report = _restore(
            model, layers, how, token_ids, lambda done: on_layer(count + done, 2 * count)
        )
    added = tuple(
        name
        for field, name in BIASES.items()
        if field in layers.biases and not getattr(config, f"{name}_bias")
    )
    config = config.with_biases(added)
    pruned = replace(model, config=config, weights=replace(model.weights, layers=layers))
    removed = model.config.num_parameters - config.num_parameters
    return Pruned(pruned, report, removed, added)


class PrunedLayers(LayersAtUse[LayerWeights]):
    """The layers of a model, cut at their use; what was restored is kept."""

    def __init__(self, layers: Sequence[LayerWeights], kept: Sequence[Kept], head_dim: int) -> None:
        self._layers, self.kept, self._head_dim = layers, kept, head_dim
        self._restored: dict[int, dict[str, torch.Tensor]] = {}
        self.biases: set[str] = set()  # that some layer was restored by; the others have zeros

    def restore(
        self,
        index: int,
        found: Restored | None,
        matrix: str,
        bias: str,
        before: torch.Tensor | None,
    ) -> None:
        """With these fields of LayerWeights; `before` is the bias that the layer had."""
        if found is None:
            return
        own = self._restored.setdefault(index, {})
        if found.weight is not None:
            own[matrix] = found.weight
        if found.bias is not None:
            own[bias] = found.bias if before is None else before + found.bias
            self.biases.add(bias)

    def __len__(self) -> int:
        return len(self._layers)

    def layer(self, index: int) -> LayerWeights:
        layer = cut(self._layers[index], self.kept[index], self._head_dim)
        own = self._restored.get(index, {})
        zeros = {
            name: torch.zeros(len(layer.wo)) for name in self.biases if getattr(layer, name) is None
        }
        matrices = {name: t.to(layer.wo.dtype) for name, t in own.items() if t.dim() == 2}
        return replace(layer, **zeros | own | matrices)


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


@told_as_config_error()
def statistics_of(
    model: LoadedModel,
    token_ids: torch.Tensor,
    on_layer: Callable[[int], None] = lambda done: None,
) -> list[LayerStatistics]:
    """What all criteria need, from one walk through the whole model. token_ids [windows, tokens]. Raises ConfigError
    of a text that some layer makes NaN or infinity of, CorruptCheckpoint of weights that are."""
    walk, found = Walk(model, token_ids), []
    for index in range(model.config.num_layers):
        found.append(_statistics(walk, index, _whole(model, index)))
        on_layer(index + 1)
    return found


def _choose(model: LoadedModel, how: Prune, statistics: Sequence[LayerStatistics]) -> list[Kept]:
    """The budget is over all layers."""
    config = model.config
    generator = torch.Generator().manual_seed(how.seed)
    units = []
    for index, seen in enumerate(statistics):
        layer = _whole(model, index)
        matrices = LayerMatrices(layer.wq, layer.wo, layer.w_gate, layer.w_up, layer.w_down)
        importance = CRITERIA[how.criterion](matrices, seen, generator)
        units.append(units_of_layer(config, how, index, importance))
    removals = allocate(config, how, units)
    return [
        _kept(config.layer(index), own, removal)
        for index, (own, removal) in enumerate(zip(units, removals, strict=True))
    ]


def _statistics(walk: Walk, index: int, layer: LayerWeights) -> LayerStatistics:
    """Of layer `index`; the walk goes through it."""
    seen = _nothing_seen(walk.config, index)
    for own in walk.x:
        heads = walk.heads(index, layer, walk.norm(own, layer.attn_norm))
        seen.add_heads(heads, layer.wo)
        own += F.linear(heads, layer.wo, layer.bo)
        made = activations(layer, walk.norm(own, layer.mlp_norm))
        seen.neurons.add(made)
        own += F.linear(made, layer.w_down, layer.bd)
    found = (seen.heads.squares, seen.head_outputs, seen.neurons.squares, walk.x)
    if not all(bool(own.isfinite().all()) for own in found):
        raise NonFiniteInputs(
            f"what layer {index} makes of it is not finite; give text that the model can read, or another model"
        )
    return seen


def _nothing_seen(config: ModelConfig, index: int) -> LayerStatistics:
    size = config.layer(index)
    return LayerStatistics.zeros(size.num_heads, config.head_dim, size.intermediate_size)


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
    how: Prune,
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

        output = _fitted(walk, whole.wo, heads, heads_of, how, f"layer {index}: output")
        layers.restore(index, output, "wo", "bo", whole.bo)
        served = _exact(layers[index])
        for own in walk.x:
            own += F.linear(heads_of(own)[:, heads], served.wo, served.bo)
        down = _fitted(walk, whole.w_down, kept.neurons, neurons_of, how, f"layer {index}: down")
        layers.restore(index, down, "w_down", "bd", whole.bd)
        walk.add_feed_forward(_exact(layers[index]))
        report.append(PrunedLayer(kept.size, output, down))
        on_layer(index + 1)
    return report


def _fitted(
    walk: Walk,
    weight: torch.Tensor,
    kept: torch.Tensor,
    inputs_of: Callable[[torch.Tensor], torch.Tensor],
    how: Prune,
    name: str,
) -> Restored | None:
    """None where nothing was removed."""
    if len(kept) == weight.shape[1]:
        return None
    assert how.restore != "none"
    fitted, held_out = (InputMoments.full(weight.shape[1] + 1) for _ in range(2))
    for window, own in enumerate(walk.x):
        moments = held_out if window % HELD_OUT == HELD_OUT - 1 else fitted
        moments.add(_weighed(inputs_of(own), weight), name)
    return restore(weight, kept, fitted.sums, held_out.sums, how.restore)


def _weighed(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """inputs [tokens, in] with a 1 behind them, over the size of their outputs: each token counts by the share of its
    own outputs that is lost. An attention sink's are a thousand times the others', which would not count beside it."""
    sizes = torch.linalg.vector_norm(F.linear(inputs, weight), dim=1, keepdim=True)
    least = SMALLEST * float(sizes.mean()) or 1.0
    with_ones = F.pad(inputs, (0, 1), value=1.0)
    return with_ones.div_(sizes.clamp_(min=least))


def _whole(model: LoadedModel, index: int) -> LayerWeights:
    """In float32. Raises NonFiniteWeights."""
    layer = _exact(model.weights.layers[index])
    for field in fields(layer):
        own = getattr(layer, field.name)
        if own is not None and not bool(own.isfinite().all()):
            raise NonFiniteWeights(f"layer {index}: {field.name} holds values that are not finite")
    return layer


def _exact(layer: LayerWeights) -> LayerWeights:
    """In float32."""
    tensors = {field.name: getattr(layer, field.name) for field in fields(layer)}
    return replace(layer, **{name: t.float() for name, t in tensors.items() if t is not None})
