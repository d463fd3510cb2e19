"""A coarse copy of an LM head: int4, with what it is off in the directions that its inputs take most."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparse_kernels._abi import SK_COLUMN_TILE, SK_SCAN_DIRECTIONS
from sparse_kernels.formats import SCAN
from sparse_kernels.weights import QuantizedMatrix, ScanTensors
from sparserve.compression.quantize import quantize

BLOCK_ELEMENTS = 1 << 21  # in float64 at once


def make_scan(lm_head: torch.Tensor, inputs: torch.Tensor) -> ScanTensors:
    """The scan of `lm_head` [vocab, hidden] in bfloat16; `inputs` [n, hidden] float32 are some that it may
    get, as many different ones as can be had.

    With D the rounding error of the int4 weights and U an orthonormal basis of the inputs' principal
    directions, D x = (D U^T) (U x) + the rest: the scan has D U^T as further columns. What is left of D,
    split into a part along U and one across it, bounds a row's error by Cauchy-Schwarz. The bounds hold for
    every input; they are tight for those like `inputs`. Raises as `quantize`.
    """
    hidden = lm_head.shape[1]
    basis = principal_directions(inputs)
    directions = basis.double()
    inverse = torch.linalg.pinv(directions @ directions.T)
    parts, errors = [], []
    step = max(1, BLOCK_ELEMENTS // hidden)
    for begin in range(0, len(lm_head), step):
        rows = lm_head[begin : begin + step]
        main = quantize(rows, SCAN, "lm_head")
        off = rows.double() - main.dequantize().double()
        more = quantize((off @ directions.T).bfloat16(), SCAN, "lm_head's errors")
        off -= more.dequantize().double() @ directions
        along = off @ directions.T @ inverse
        across = off - along @ directions
        # The basis is in bfloat16: what is across it is so but for a rounding error.
        leak = (across @ directions.T).norm(dim=1)
        errors.append(torch.stack((along.norm(dim=1) + leak, across.norm(dim=1))))
        parts.append(_side_by_side(main, more, hidden))
    matrix = QuantizedMatrix(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.zeros for part in parts]),
        SCAN.bits,
        SCAN.group_size,
    )
    # Up, whatever float32 rounds.
    return ScanTensors(matrix, basis, (torch.cat(errors, dim=1) * (1 + 1e-6)).float())


def principal_directions(inputs: torch.Tensor) -> torch.Tensor:
    """inputs [n, hidden] -> their principal directions [SK_SCAN_DIRECTIONS, hidden] in bfloat16, zeros
    where there are fewer."""
    finite = inputs[inputs.isfinite().all(dim=1)].double()
    found = torch.linalg.svd(finite, full_matrices=False).Vh[:SK_SCAN_DIRECTIONS]
    return F.pad(found, (0, 0, 0, SK_SCAN_DIRECTIONS - len(found))).bfloat16()


def _side_by_side(main: QuantizedMatrix, more: QuantizedMatrix, hidden: int) -> QuantizedMatrix:
    codes = F.pad(main.codes, (0, -hidden % SK_COLUMN_TILE))
    return QuantizedMatrix(
        torch.cat((codes, more.codes), dim=1),
        torch.cat((main.scales, more.scales), dim=1),
        torch.cat((main.zeros, more.zeros), dim=1),
        SCAN.bits,
        SCAN.group_size,
    )
