"""A model compressed layer by layer: the inputs of each matrix are what comes out of all that is
compressed before it, so that later ones make up for earlier ones. Only one layer is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from sparse_kernels.formats import MatrixFormat
from sparse_kernels.weights import LayerTensors, Matrix
from sparserve.compression.gptq import DAMPING, UnusableMoments
from sparserve.compression.matrix import MatrixReport, compress
from sparserve.compression.quantize import quantize
from sparserve.compression.recipe import Recipe
from sparserve.compression.scaling import column_scales
from sparserve.compression.statistics import (
    InputMoments,
    NonFiniteInputs,
    nearest_to_outputs,
)
from sparserve.errors import ConfigError
from sparserve.model.config import ModelConfig
from sparserve.model.effective import effective
from sparserve.model.loader import LoadedModel
from sparserve.model.packing import layer_tensors, told_as_model_errors
from sparserve.model.stacks import (
    DOWN,
    GATE_UP,
    OUTPUT,
    QKV,
    STACKS,
    Stack,
    columns_alike,
    expected_squares,
    split_rows,
    with_inputs_divided,
)
from sparserve.model.walk import Walk, activations
from sparserve.model.weights import LayerWeights, layer_shapes

# Inputs whose full second moments are kept though GPTQ does not need them: 128 MiB.
FULL_MOMENTS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class CompressedLayer:
    index: int
    tensors: LayerTensors
    reports: Sequence[MatrixReport]  # of each stack that is compressed


def compress_layers(
    model: LoadedModel,
    recipe: Recipe,
    token_ids: torch.Tensor | None = None,
    done: Iterable[LayerTensors] = (),
) -> Iterator[CompressedLayer]:
    """All layers after `done`, the first ones as they were compressed before.

    Matrices of `model` are bfloat16 in main memory; it is best loaded with `layers_at_use`. token_ids
    [windows, tokens] are the calibration's; a recipe that needs no text ignores them. With as many torch
    threads, the same model, recipe and text give the same bytes, wherever a run was interrupted.

    Raises ConfigError of a recipe that does not fit the model, and of a text whose inputs do not do;
    CorruptCheckpoint or UnsupportedModel of weights that cannot be compressed.
    """
    check_recipe(model.config, recipe)
    walks = None
    if recipe.needs_text:
        if token_ids is None or not token_ids.numel():
            raise ConfigError(
                f"the recipe {recipe.name} needs a text to calibrate on and got none; give one, or take "
                "quantizer rtn with compensate none or lorc"
            )
        original = Walk(model, token_ids) if recipe.target == "outputs" else None
        walks = _Walks(Walk(model, token_ids), original)
    first = 0
    for tensors in done:
        if walks is not None:
            exact = effective(layer_tensors(model.weights.layers[first]))
            walks.add_attention(first, tensors, exact)
            walks.add_feed_forward(tensors, exact)
        first += 1
    for index in range(first, model.config.num_layers):
        with told_as_config_error():
            layer = _compressed(model, index, recipe, walks)
        yield layer


def compress_lm_head(model: LoadedModel, recipe: Recipe) -> Matrix | None:
    """The LM head; None where it stays what it is, the embedding if it is tied to it. Raises as
    `compress_layers`."""
    format = recipe.lm_head.format()
    if not format.quantized:
        return None if model.config.tie_word_embeddings else model.weights.lm_head
    with told_as_config_error():
        return quantize(model.weights.lm_head, format, "lm_head")


def check_recipe(config: ModelConfig, recipe: Recipe) -> None:
    """Raises ConfigError of a layer, or of a rank, that matrices of this model do not have."""
    last = max((index for own in recipe.overrides for index in own.layers), default=0)
    if last >= config.num_layers:
        raise ConfigError(
            f"overrides of the recipe {recipe.name} are of layer {last}, and the last layer of this model is "
            f"{config.num_layers - 1}"
        )
    for stack in STACKS:
        rank = max(own.rank for own in recipe.formats_of(stack.part))
        least = min(_full_rank(stack, layer_shapes(config, i)) for i in range(config.num_layers))
        if rank > least:
            raise ConfigError(
                f"{stack.part}.rank of the recipe {recipe.name} is {rank}, and {', '.join(stack.names)} of "
                f"this model have rank {least} at most; lower it"
            )


def _full_rank(stack: Stack, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return min(sum(shapes[field][0] for field in stack.fields), shapes[stack.fields[0]][1])


@dataclass(frozen=True, slots=True)
class _Walks:
    """Of the compressed model, and of the original one where its outputs are what to come near to."""

    compressed: Walk
    original: Walk | None

    def add_attention(self, index: int, layer: LayerTensors, exact: LayerWeights) -> None:
        """`exact` is the layer as it was, in float32."""
        self.compressed.add_attention(index, effective(layer))
        if self.original is not None:
            self.original.add_attention(index, exact)

    def add_feed_forward(self, layer: LayerTensors, exact: LayerWeights) -> None:
        self.compressed.add_feed_forward(effective(layer))
        if self.original is not None:
            self.original.add_feed_forward(exact)


def _compressed(
    model: LoadedModel, index: int, recipe: Recipe, walks: _Walks | None
) -> CompressedLayer:
    layer, formats = layer_tensors(model.weights.layers[index]), recipe.formats().layer(index)
    exact = effective(layer)
    reports: list[MatrixReport] = []

    def compress_stack(stack: Stack, layer: LayerTensors) -> LayerTensors:
        format: MatrixFormat = getattr(formats, stack.part)
        if not format.quantized:
            return layer
        parts = [getattr(layer, name) for name in stack.names]
        weight, moments = torch.cat(parts), None
        name = f"layer {index}: {', '.join(stack.names)}"
        if walks is not None:
            moments = new_moments(recipe, stack, weight.shape[1])
            drift = _measure(walks, index, stack, layer, exact, moments, name)
            if drift is not None:
                weight = nearest_to_outputs(weight, moments, drift, DAMPING)
        if recipe.scale_columns and stack.scaled:
            squares = (
                moments.squares
                if moments is not None
                else expected_squares(layer, stack, weight.shape[1])
            )
            alike = columns_alike(stack, model.config, index)
            scales = column_scales(weight, squares, format, name, alike)
            weight, layer = weight * scales, with_inputs_divided(layer, stack, scales, alike)
            moments = moments and moments.divided(scales)
        found = compress(weight, moments, format, recipe, name, transposed=stack is DOWN)
        reports.append(found.report)
        rows = [len(part) for part in parts]
        pieces = [found.matrix] if len(rows) == 1 else split_rows(found.matrix, rows)
        changes: dict[str, Any] = dict(zip(stack.names, pieces, strict=True))
        changes[stack.basis] = found.basis
        return replace(layer, **changes)

    layer = compress_stack(OUTPUT, compress_stack(QKV, layer))
    if walks is not None:
        walks.add_attention(index, layer, exact)
    layer = compress_stack(DOWN, compress_stack(GATE_UP, layer))
    if walks is not None:
        walks.add_feed_forward(layer, exact)
    return CompressedLayer(index, layer, reports)


def new_moments(recipe: Recipe, stack: Stack, width: int) -> InputMoments:
    """Of the kind that `recipe` needs, of no tokens yet."""
    full = recipe.quantizer == "gptq" or (
        recipe.compensate == "qera" and (stack is not DOWN or width <= FULL_MOMENTS)
    )
    return InputMoments.full(width) if full else InputMoments.diagonal(width)


def _measure(
    walks: _Walks,
    index: int,
    stack: Stack,
    layer: LayerTensors,
    exact: LayerWeights,
    moments: InputMoments,
    name: str,
) -> torch.Tensor | None:
    """Count in `moments` what goes into `stack`, with what is compressed before it.

    -> The drift that `nearest_to_outputs` makes up for; None where nobody asks for it. Outputs that are
    added to the residual stream also make up for that of the stream.
    """
    compressed, original = walks.compressed, walks.original
    inputs = stack_inputs(compressed, index, stack, effective(layer))
    if original is None:
        for own in inputs:
            moments.add(own, name)
        return None
    weight = torch.cat([getattr(exact, field) for field in stack.fields])
    drift = torch.zeros(weight.shape, dtype=torch.float64)
    pairs = zip(inputs, stack_inputs(original, index, stack, exact), strict=True)
    for window, (own, wanted) in enumerate(pairs):
        moments.add(own, name)
        missing = F.linear(wanted - own, weight)
        if stack in (OUTPUT, DOWN):
            missing += original.x[window] - compressed.x[window]
        drift += missing.T @ own
    return drift


def stack_inputs(
    walk: Walk, index: int, stack: Stack, layer: LayerWeights
) -> Iterator[torch.Tensor]:
    """Of each window, [tokens, width]. With its first token: an attention sink, much larger than all others in
    some layers, which must stay right (without it GPTQ's KL on SmolLM2 is .57 instead of .39)."""
    attention = stack in (QKV, OUTPUT)
    for own in walk.x:
        normed = walk.norm(own, layer.attn_norm if attention else layer.mlp_norm)
        if stack is OUTPUT:
            yield walk.heads(index, layer, normed)
        elif stack is DOWN:
            yield activations(layer, normed)
        else:
            yield normed


@contextmanager
def told_as_config_error() -> Iterator[None]:
    try:
        with told_as_model_errors():
            yield
    except (UnusableMoments, NonFiniteInputs) as error:
        raise ConfigError(f"the calibration text does not do: {error}") from error
