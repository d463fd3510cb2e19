"""Asymmetric round-to-nearest quantization in groups."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from sparse_kernels.formats import LayerFormats, MatrixFormat
from sparse_kernels.weights import LayerTensors, Matrix, NonFiniteWeights, QuantizedMatrix

# Weights that are rounded at once, by all threads: their temporaries stay in caches.
BLOCK_ELEMENTS = 1 << 19


class ScaleOverflow(ValueError):
    """Weights are too large for a scale in float16; the message names the tensor."""


def quantize(
    weight: torch.Tensor, format: MatrixFormat, name: str, value_bits: int | None = None
) -> QuantizedMatrix:
    """Round `weight` [rows, columns], bfloat16 or float32 with any strides, to integers of `format`.

    For each group of columns of a row, with 0 in the range of its values:

        scale = (largest - least) / (2^bits - 1), in float16 the next that is not smaller
        zero  = round(-least / scale)
        code  = round(value / scale) + zero, at most 2^bits - 1

    So a value is at most half a scale off, and not at all where it is 0. A group of zeros has scale 0.
    Quotients of bfloat16 in float32 are rounded as exact ones would be: an 8-bit number divided by an 11-bit
    one, below 2^8, is a half or at least 2^-12 from it. Those of float32 may go the other way near a half.

    `value_bits` stands for `bits` in these formulas if given: codes of that many bits in the storage of
    `format`, to study what fewer would lose.

    Raises NonFiniteWeights or ScaleOverflow, with `name` in the message; ValueError of `value_bits`.
    """
    rows, columns = weight.shape
    groups, largest_code = format.groups(columns), greatest_code(format, value_bits)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(rows, groups, dtype=torch.float16)
    zeros = torch.empty(rows, groups, dtype=torch.uint8)
    step = max(1, BLOCK_ELEMENTS // columns)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        block = weight[part].to(torch.float32, memory_format=torch.contiguous_format)
        # Zeros at the end do not change a range that has 0 in it anyway.
        block = F.pad(block, (0, groups * format.group_size - columns))
        values = block.view(-1, groups, format.group_size)
        least, largest = values.amin(2).clamp_(max=0), values.amax(2).clamp_(min=0)
        scales[part] = own = group_scales(least, largest, largest_code)
        if not bool(own.isfinite().all()):
            raise refusal(weight[part], name)
        steps = divisors(own).float()
        zeros[part] = (-least / steps).round_()
        values.div_(steps[..., None]).round_().add_(zeros[part][..., None])
        codes[part] = values.clamp_(max=largest_code).flatten(1)[:, :columns]
    return QuantizedMatrix(codes, scales, zeros, format.bits, format.group_size)


def quantize_layer(layer: LayerTensors, formats: LayerFormats, where: str) -> LayerTensors:
    """A layer with those matrices quantized that `formats` wants so and that are not yet; `where` begins
    their names in errors. Raises as `quantize`."""

    def quantized(name: str, weight: Matrix, format: MatrixFormat) -> Matrix:
        if not format.quantized or isinstance(weight, QuantizedMatrix):
            return weight
        # Groups run within a neuron, which is a column of down.
        return quantize(weight.T if name == "down" else weight, format, where + name)

    attention, gate_up = formats.attention, formats.gate_up
    return replace(
        layer,
        q=quantized("q", layer.q, attention),
        k=quantized("k", layer.k, attention),
        v=quantized("v", layer.v, attention),
        output=quantized("output", layer.output, attention),
        gate=quantized("gate", layer.gate, gate_up),
        up=quantized("up", layer.up, gate_up),
        down=quantized("down", layer.down, formats.down),
    )


def greatest_code(format: MatrixFormat, value_bits: int | None = None) -> int:
    """Of codes of `value_bits`, by default all bits of `format`. Raises ValueError."""
    bits = format.bits if value_bits is None else value_bits
    if not 2 <= bits <= format.bits:
        raise ValueError(f"value_bits is {bits}; in codes of {format} it can be 2 to {format.bits}")
    return (1 << bits) - 1


def group_scales(least: torch.Tensor, largest: torch.Tensor, largest_code: int) -> torch.Tensor:
    """(largest - least) / largest_code rounded up to float16, so that every range fits the codes, however
    small; inf where float16 has none."""
    ranges = largest.double() - least
    scales = (ranges / largest_code).half()
    too_small = scales.double() * largest_code < ranges
    # The bits of a positive number plus one are those of the next larger.
    return (scales.view(torch.int16) + too_small).view(torch.float16)


def divisors(scales: torch.Tensor) -> torch.Tensor:
    """Scales for quotients, in float16: inf for 0, so that a group of scale 0 has codes of 0."""
    return scales.masked_fill(scales == 0, torch.inf)


def refusal(weight: torch.Tensor, name: str) -> ValueError:
    """Why `weight` has no finite scales."""
    if not bool(weight.isfinite().all()):
        return NonFiniteWeights(f"{name} holds values that are not finite")
    least, largest = (float(end) for end in weight.aminmax())
    return ScaleOverflow(
        f"{name} has weights of {least:g} to {largest:g}, which need a scale beyond float16's 65504; "
        "leave it in bfloat16"
    )
