"""Matrices of a layer that have the same inputs: they are compressed together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sparse_kernels.weights import Factors, LayerTensors, QuantizedMatrix
from sparserve.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices with the same inputs, which are compressed together and share the basis of a low-rank term."""

    names: tuple[str, ...]  # of LayerTensors
    fields: tuple[str, ...]  # of LayerWeights
    part: str  # of Recipe
    basis: str  # of LayerTensors
    scaled: str = ""  # of LayerTensors: takes back what its columns are scaled by


QKV = Stack(("q", "k", "v"), ("wq", "wk", "wv"), "attention", "qkv_basis", "attention_norm")
OUTPUT = Stack(("output",), ("wo",), "attention", "output_basis", "v")
GATE_UP = Stack(("gate", "up"), ("w_gate", "w_up"), "gate_up", "gate_up_basis", "mlp_norm")
DOWN = Stack(("down",), ("w_down",), "down", "down_basis")
STACKS = (QKV, OUTPUT, GATE_UP, DOWN)


def columns_alike(stack: Stack, config: ModelConfig, index: int) -> tuple[int, int, int] | None:
    """As `column_scales` wants it: query heads of a group take the values of one head."""
    if stack is not OUTPUT:
        return None
    size = config.layer(index)
    return size.num_kv_heads, size.num_heads // size.num_kv_heads, config.head_dim


def expected_squares(layer: LayerTensors, stack: Stack, width: int) -> torch.Tensor:
    """Of the inputs of `stack`, float32 [width], without having seen any: a norm's outputs are about as
    large as its weights."""
    if stack is OUTPUT:
        return torch.ones(width)
    norm: torch.Tensor = getattr(layer, stack.scaled)
    return norm.square()


def with_inputs_divided(
    layer: LayerTensors, stack: Stack, scales: torch.Tensor, alike: tuple[int, int, int] | None
) -> LayerTensors:
    """What goes into `stack`, divided by scales [its inputs]: in the norm before it, or in the rows of v."""
    if alike is None:
        return replace(layer, **{stack.scaled: getattr(layer, stack.scaled) / scales})
    v, bias, rows = layer.v, layer.v_bias, scales.view(alike)[:, 0].flatten()
    assert isinstance(v, QuantizedMatrix)  # in the format of the output
    # In float16 as they were: off by as much as 2^-12 (subnormal ones by more), far below what rounding to
    # integers costs.
    factors = v.factors and replace(v.factors, scales=(v.factors.scales / rows).half())
    v = replace(v, scales=(v.scales / rows[:, None]).half(), factors=factors)
    return replace(layer, v=v, v_bias=None if bias is None else bias / rows)


def split_rows(matrix: QuantizedMatrix, rows: Sequence[int]) -> list[QuantizedMatrix]:
    """Matrices of so many rows each."""

    def cut(tensor: torch.Tensor) -> list[torch.Tensor]:
        return [part.contiguous() for part in torch.split(tensor, list(rows))]

    codes, scales, zeros = cut(matrix.codes), cut(matrix.scales), cut(matrix.zeros)
    factors: list[Factors | None] = [None] * len(rows)
    if (own := matrix.factors) is not None:
        factors = [Factors(*pair) for pair in zip(cut(own.codes), cut(own.scales), strict=True)]
    return [
        replace(matrix, codes=codes[i], scales=scales[i], zeros=zeros[i], factors=factors[i])
        for i in range(len(rows))
    ]
