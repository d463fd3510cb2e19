"""Scales of a matrix's columns: those that matter are rounded finely, those that are large do not coarsen
the rest of their group.

W x = (W S) (S^-1 x) with S diagonal, and what makes x takes S^-1 for nothing: an RMSNorm's weight, or the rows
of v for the output projection. As AWQ does (Lin et al., arXiv 2306.00978), s_j is a power of the input's
root mean square over one of the column's own, the two exponents add up to 1, and nine pairs are tried. (All of 25
independent pairs never found a better one on SmolLM2.)
"""

from __future__ import annotations

import torch

from sparse_kernels.formats import MatrixFormat
from sparserve.compression.quantize import quantize

EXPONENTS = tuple(k / 8 for k in range(9))  # of the input
GREATEST = 16.0  # beside a typical scale of 1: scales of groups stay within float16
SAMPLE_ROWS = 2048  # that scales are chosen by


def column_scales(
    weight: torch.Tensor,
    squares: torch.Tensor,
    format: MatrixFormat,
    name: str,
    alike: tuple[int, int, int] | None = None,
) -> torch.Tensor:
    """s [in], float32: of those tried, W S rounded to nearest has the least sum over j of E x_j^2 times the
    error of column j, S^-1 undone.

    weight [out, in]; squares [in], the mean squares of its inputs or any multiple. alike (n, m, k), n m k =
    in: the columns (i, ., j) share a scale. Deterministic; 1 where none is better. Raises as `quantize`.
    """
    rows = weight[:: max(1, len(weight) // SAMPLE_ROWS)].float()
    inputs, own = (_shared(own, alike) for own in (squares.float(), rows.square().mean(0)))
    candidates = [torch.ones(weight.shape[1])]
    candidates += [_scales(inputs.pow(a / 2) / own.pow((1 - a) / 2)) for a in EXPONENTS]

    def error(scales: torch.Tensor) -> float:
        values = quantize(rows * scales, format, name).dequantize() / scales
        return float((values.sub_(rows).square_() @ squares.float()).double().sum())

    return min(candidates, key=error)


def _shared(values: torch.Tensor, alike: tuple[int, int, int] | None) -> torch.Tensor:
    """values [in], where it matters positive -> their means over columns that share a scale."""
    if alike is not None:
        values = values.view(alike).mean(1, keepdim=True).expand(alike).flatten()
    # Of an input or a column of zeros any scale will do.
    typical = float(values.median()) or 1.0
    return values.clamp(min=typical * 1e-6)


def _scales(scales: torch.Tensor) -> torch.Tensor:
    return (scales / scales.median()).clamp_(1 / GREATEST, GREATEST)
