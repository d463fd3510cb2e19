"""One matrix, or several with the same inputs stacked by rows, compressed as a recipe says."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sparse_kernels.formats import MatrixFormat
from sparse_kernels.weights import QuantizedMatrix
from sparserve.compression.gptq import gptq, gptq_transposed
from sparserve.compression.low_rank import Decomposition, lorc, qera, quantize_factors
from sparserve.compression.quantize import quantize
from sparserve.compression.recipe import Recipe
from sparserve.compression.statistics import InputMoments


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """Errors are E|(W - W') x|^2 / E|W x|^2 over the calibration's inputs x of W; without any, for inputs
    that are all alike and do not correlate. W and x are what was rounded and its inputs: with columns scaled,
    W S and S^-1 x."""

    name: str
    bits: float  # read of a weight, low-rank term included
    rounded: float  # error of the integers alone
    compensated: float  # with the low-rank term as it is stored


@dataclass(frozen=True, slots=True, eq=False)
class CompressedMatrix:
    matrix: QuantizedMatrix  # with factors where the format has a rank
    basis: torch.Tensor | None  # bfloat16 [rank, columns of `matrix`]
    report: MatrixReport


def compress(
    weight: torch.Tensor,
    moments: InputMoments | None,
    format: MatrixFormat,
    recipe: Recipe,
    name: str,
    *,
    transposed: bool = False,
) -> CompressedMatrix:
    """Round `weight` [out, in] to `format`, an integer one, and make up for it by a low-rank term.

    `moments` of its inputs are None for a recipe that needs no text, full for GPTQ. With `transposed` the
    result is that of W^T, as down is stored. Raises as `gptq` and `quantize`; ValueError of a rank beyond
    the lesser side of W.
    """
    value_bits = recipe.value_bits if format.bits == 4 else None
    stored = weight.T if transposed else weight
    if recipe.quantizer == "rtn":
        matrix = quantize(stored, format, name, value_bits)
    else:
        assert moments is not None
        rounding = gptq_transposed if transposed else gptq
        matrix = rounding(
            stored, moments, format, name, act_order=recipe.act_order, value_bits=value_bits
        )
    values = matrix.dequantize()
    error = weight.float() - (values.T if transposed else values)
    rest, basis = error, None
    if format.rank:
        factors = _decompose(error, moments, recipe, format.rank).factors(format.rank)
        # Of down, a row's activations become integers for the matrix and for B together.
        scale = float(matrix.scales.max()) if transposed else 1.0
        made = quantize_factors(factors.transposed if transposed else factors, scale or 1.0)
        matrix, basis = replace(matrix, factors=made.factors), made.inputs
        term = made.dequantize()
        product = term.outputs @ term.inputs
        rest = error - (product.T if transposed else product)
    size = _power(weight.float(), moments)
    rounded, compensated = (_power(own, moments) / size if size else 0.0 for own in (error, rest))
    bits = 8 * (format.bytes(*stored.shape) + format.basis_bytes(stored.shape[1])) / weight.numel()
    return CompressedMatrix(matrix, basis, MatrixReport(name, bits, rounded, compensated))


def _decompose(
    error: torch.Tensor, moments: InputMoments | None, recipe: Recipe, rank: int
) -> Decomposition:
    if recipe.compensate == "lorc":
        return lorc(error, rank)
    assert moments is not None
    if recipe.compensate == "qera-diagonal" and not moments.is_diagonal:
        moments = InputMoments(moments.squares.clone(), moments.tokens)
    return qera(error, moments, rank)


def _power(matrix: torch.Tensor, moments: InputMoments | None) -> float:
    """The sum over inputs x of |matrix x|^2."""
    exact = matrix.double()
    if moments is None:
        return float(exact.square().sum())
    if moments.is_diagonal:
        return float(exact.square().sum(dim=0) @ moments.sums)
    return float((exact @ moments.sums).mul_(exact).sum())
