"""The layers of a model as they are served, and what goes into their feed-forwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparse_kernels.formats import DecoderFormats, MatrixFormat
from sparse_kernels.weights import (
    FACTOR_ZERO,
    Factors,
    LayerTensors,
    Matrix,
    QuantizedMatrix,
)
from sparserve.compression.quantize import quantize_layer
from sparserve.model.effective import effective
from sparserve.model.loader import LoadedModel
from sparserve.model.packing import layer_tensors
from sparserve.model.walk import Walk
from sparserve.model.weights import LayerWeights


@dataclass(frozen=True, slots=True)
class UpperPlane:
    """What the upper bits of a matrix say of it; the mean of all lower ones is added."""

    values: torch.Tensor  # [neurons, hidden]
    # [neurons, groups]: variance of an element, its lower bits being anything.
    variances: torch.Tensor
    group_size: int
    # Of a low-rank term, whose upper bits are in `values`: its basis [rank, hidden], and the variance of what
    # the lower bits of a row's factors make of an input of length 1 in it, [neurons].
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None

    def to(self, where: torch.device | torch.dtype) -> UpperPlane:
        pair = self.low_rank and (self.low_rank[0].to(where), self.low_rank[1].to(where))
        return UpperPlane(self.values.to(where), self.variances.to(where), self.group_size, pair)

    def products(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [tokens, hidden] -> (products, their variances), [tokens, neurons] each."""
        padded = F.pad(x.square(), (0, -x.shape[1] % self.group_size))
        squares = padded.view(len(x), -1, self.group_size).sum(dim=2)
        variances = squares @ self.variances.T
        if self.low_rank is not None:
            basis, by_row = self.low_rank
            variances += (x @ basis.T).square().sum(dim=1, keepdim=True) * by_row
        return x @ self.values.T, variances


@dataclass(frozen=True, slots=True)
class FeedForward:
    """One layer's matrices, [neurons, hidden], float32 unless they were taken to another type."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    upper: tuple[UpperPlane, UpperPlane] | None = None  # of gate and up, where they have planes

    def to(self, where: torch.device | torch.dtype) -> FeedForward:
        upper = self.upper and (self.upper[0].to(where), self.upper[1].to(where))
        return FeedForward(self.gate.to(where), self.up.to(where), self.down.to(where), upper)

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden], after the norm -> [tokens, neurons]."""
        return F.silu(x @ self.gate.T) * (x @ self.up.T)


def walk(
    model: LoadedModel, formats: DecoderFormats, token_ids: torch.Tensor
) -> Iterator[tuple[FeedForward, torch.Tensor]]:
    """token_ids [windows, tokens] -> of each layer its feed-forward, and what goes into it, [windows, tokens,
    hidden]."""
    steps = Walk(model, token_ids)
    for index in range(model.config.num_layers):
        made = _stored(model, formats, index)
        layer = effective(made)
        steps.add_attention(index, layer)
        mlp = feed_forward(made, layer, formats.gate_up)
        normed = steps.norm(steps.x, layer.mlp_norm)
        yield mlp, normed
        for own, inputs in zip(steps.x, normed, strict=True):
            own += mlp.activations(inputs) @ mlp.down
            if layer.bd is not None:
                own += layer.bd


def _stored(model: LoadedModel, formats: DecoderFormats, index: int) -> LayerTensors:
    """A layer in `formats`, which are those of a compressed model where it is one."""
    if model.rounded is not None and formats == model.rounded.formats:
        return model.rounded.layers[index]
    return quantize_layer(layer_tensors(model.weights.layers[index]), formats.layer(index), "")


def feed_forward(made: LayerTensors, layer: LayerWeights, gate_up: MatrixFormat) -> FeedForward:
    """Of a layer as it is stored and as it computes; its gate and up are in the format `gate_up`."""
    planes = [
        _upper(matrix, gate_up.low_bits, made.gate_up_basis) for matrix in (made.gate, made.up)
    ]
    upper = None if planes[0] is None or planes[1] is None else (planes[0], planes[1])
    return FeedForward(layer.w_gate, layer.w_up, layer.w_down.T.contiguous(), upper)


def _upper(matrix: Matrix, low_bits: int, basis: torch.Tensor | None) -> UpperPlane | None:
    if not isinstance(matrix, QuantizedMatrix) or not low_bits:
        return None
    columns, unit = matrix.codes.shape[1], 1 << low_bits
    scales, zeros = (
        own.float().repeat_interleave(matrix.group_size, dim=1)[:, :columns]
        for own in (matrix.scales, matrix.zeros)
    )
    codes = (matrix.codes >> low_bits << low_bits).float() + (unit - 1) / 2
    values, variance = scales * (codes - zeros), (unit**2 - 1) / 12
    low_rank = None
    if matrix.factors is not None and basis is not None:
        values.addmm_(_upper_factors(matrix.factors, matrix.bits, low_bits), basis.float())
        # A factor is one code of 8 bits, or two of 4.
        variance_of_code = variance * sum(4**shift for shift in range(0, 8, matrix.bits))
        low_rank = basis.float(), matrix.factors.scales.float().square() * variance_of_code
    variances = matrix.scales.float().square() * variance
    return UpperPlane(values, variances, matrix.group_size, low_rank)


def _upper_factors(factors: Factors, bits: int, low_bits: int) -> torch.Tensor:
    """float32 [rows, rank]: of codes of `bits` the upper bits, and the mean of the lower ones."""
    numbers = torch.full(factors.codes.shape, float(-FACTOR_ZERO))
    for shift in range(0, 8, bits):
        code = factors.codes >> shift & ((1 << bits) - 1)
        upper = (code >> low_bits << low_bits).float() + ((1 << low_bits) - 1) / 2
        numbers += upper * (1 << shift)
    return factors.scales.float()[:, None] * numbers
