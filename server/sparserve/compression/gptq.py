"""GPTQ: inputs of a matrix are rounded one after another, the rest makes up for what each is off.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323. With H = 2 sum x x^T of the calibration's inputs and U the upper triangular factor of
H^-1 = U^T U, column i of W [out, in] is rounded to q_i, and

    e = (w_i - q_i) / U_ii,    w_j -= e U_ij for all j > i,

which minimizes sum |(W - Q) x|^2 over what is not yet rounded. Factors of H cancel out, its 2 too. All
in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from sparse_kernels.formats import MatrixFormat
from sparse_kernels.weights import QuantizedMatrix
from sparserve.compression.quantize import divisors, greatest_code, group_scales, refusal
from sparserve.compression.statistics import InputMoments

# Inputs whose errors reach all later ones in one product; every group size divides it.
BLOCK_INPUTS = 128
DAMPING = 0.01  # of the mean diagonal of H, added to it
# Of a group's range from its least to its largest value, what is tried as the range of its codes.
SHRINKS = torch.tensor([1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7], dtype=torch.float64)


class UnusableMoments(ValueError):
    """Second moments that do not tell how inputs make up for one another; the message names the tensor."""


def gptq(
    weight: torch.Tensor,
    moments: InputMoments,
    format: MatrixFormat,
    name: str,
    *,
    act_order: bool = True,
    damping: float = DAMPING,
    value_bits: int | None = None,
) -> QuantizedMatrix:
    """Round `weight` [out, in] in groups of inputs, as those of q, k, v, output, gate and up are stored.

    `moments` are full, of width `in`; matrices that share their inputs can be stacked by rows. With
    `act_order` inputs are taken by falling mean square; groups stay as they are stored ("static groups"), so
    they get scales and zeros of the original weights beforehand. Without, inputs are
    taken as they are stored, and a group gets its scale and zero when it is reached, of what the weights are
    by then.

    An input that was always 0 is rounded for itself: it may not be 0 when served. `value_bits` as in
    `quantize`. Takes about 5 in^2 + 2 in out numbers of 8 bytes.

    Raises UnusableMoments, NonFiniteWeights or ScaleOverflow with `name` in the message; ValueError of
    `value_bits`.
    """
    size, largest_code = format.group_size, greatest_code(format, value_bits)
    order = _order(moments, weight.shape[1], act_order, name)
    values = _finite(weight.T, name)
    groups = format.groups(len(values))
    codes = torch.empty(values.shape, dtype=torch.uint8)
    scales = torch.empty(groups, values.shape[1], dtype=torch.float16)
    steps, zeros = (torch.empty(scales.shape, dtype=torch.float64) for _ in range(2))

    def fit(group: int, members: torch.Tensor, squares: torch.Tensor) -> None:
        """members [inputs of the group, out], squares [inputs of the group]"""
        found = _fit(members, squares, largest_code, weight, name)
        scales[group], steps[group], zeros[group] = found

    if act_order:
        own_squares = torch.split(moments.squares, size)
        for group, members in enumerate(torch.split(values, size)):
            fit(group, members, own_squares[group])
        values = values[order]
    column_of = order.tolist()

    def rounded(i: int) -> torch.Tensor:
        column = column_of[i]
        group, first = divmod(column, size)
        if not act_order and first == 0:
            fit(group, values[i : i + size], moments.squares[i : i + size])
        own = _codes(values[i], steps[group], zeros[group], largest_code)
        codes[column] = own
        return scales[group] * own.sub_(zeros[group])

    _round_in_turn(values, _inverse_factor(moments, order, damping, name), rounded)
    codes, scales, zeros = (own.T.contiguous() for own in (codes, scales, zeros.to(torch.uint8)))
    return QuantizedMatrix(codes, scales, zeros, format.bits, size)


def gptq_transposed(
    weight: torch.Tensor,
    moments: InputMoments,
    format: MatrixFormat,
    name: str,
    *,
    act_order: bool = True,
    damping: float = DAMPING,
    value_bits: int | None = None,
) -> QuantizedMatrix:
    """Round `weight` [in, out], the transpose of a matrix, in groups of outputs: as down is stored, a neuron
    to a row.

    An input's groups are its own and get scales and zeros when it is reached, so `act_order` costs nothing.
    All else as in `gptq`.
    """
    largest_code = greatest_code(format, value_bits)
    order = _order(moments, len(weight), act_order, name)
    values = _finite(weight, name)[order]
    outputs = values.shape[1]
    groups = format.groups(outputs)
    codes = torch.empty(values.shape, dtype=torch.uint8)
    scales = torch.empty(len(values), groups, dtype=torch.float16)
    zeros = torch.empty(len(values), groups, dtype=torch.uint8)
    row_of = order.tolist()
    alike = torch.ones(format.group_size, dtype=torch.float64)

    def rounded(i: int) -> torch.Tensor:
        # Zeros at the end do not change a range that has 0 in it anyway.
        own = F.pad(values[i], (0, groups * format.group_size - outputs)).view(groups, -1)
        scale, step, zero = _fit(own.T, alike, largest_code, weight, name)
        own = _codes(own, step[:, None], zero[:, None], largest_code)
        row = row_of[i]
        codes[row], scales[row], zeros[row] = own.flatten()[:outputs], scale, zero
        return (scale[:, None] * own.sub_(zero[:, None])).flatten()[:outputs]

    _round_in_turn(values, _inverse_factor(moments, order, damping, name), rounded)
    return QuantizedMatrix(codes, scales, zeros, format.bits, format.group_size)


def _round_in_turn(
    values: torch.Tensor, factor: torch.Tensor, rounded: Callable[[int], torch.Tensor]
) -> None:
    """values [in, out] float64, changed in place; factor is U. rounded(i) -> what values[i] becomes, [out]."""
    for begin in range(0, len(values), BLOCK_INPUTS):
        end = min(begin + BLOCK_INPUTS, len(values))
        errors = torch.empty_like(values[begin:end])
        for i in range(begin, end):
            error = torch.sub(values[i], rounded(i), out=errors[i - begin]).div_(factor[i, i])
            later = factor[i, i + 1 : end, None]
            values[i + 1 : end].addmm_(later, error[None], alpha=-1)
        values[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)


def _inverse_factor(
    moments: InputMoments, order: torch.Tensor, damping: float, name: str
) -> torch.Tensor:
    """U of the inputs in this order, float64 [in, in].

    Cholesky's factor of H from its last row up is upper triangular, H = M M^T, so that U = M^-1: H^-1
    itself is not needed.
    """
    backwards = order.flip(0)
    hessian = moments.sums[backwards[:, None], backwards]
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    typical = float(diagonal.sum() / (~dead).sum()) if not bool(dead.all()) else 1.0
    # Nothing couples a dead input to others, so that any number will do.
    diagonal.masked_fill_(dead, typical).add_(damping * typical)
    factor, failed = torch.linalg.cholesky_ex(hessian)
    pivots = factor.diagonal().square()
    width = len(order)
    limit = width * torch.finfo(torch.float64).eps * float(diagonal.max())
    if bool(failed) or float(pivots.min()) <= limit:
        raise UnusableMoments(
            f"moments of {moments.tokens} tokens for the {width} inputs of {name} are singular with "
            f"damping {damping:g}; give at least {width} different tokens, or damp more ({DAMPING:g} is usual)"
        )
    identity = torch.eye(width, dtype=torch.float64)
    inverse: torch.Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse.flip(0, 1)


def _order(moments: InputMoments, width: int, act_order: bool, name: str) -> torch.Tensor:
    """The `width` inputs in the order in which they are rounded."""
    if moments.is_diagonal or moments.width != width or not moments.tokens:
        kind = "diagonal" if moments.is_diagonal else "full"
        raise UnusableMoments(
            f"{name} has {kind} moments of {moments.width} inputs and {moments.tokens} tokens; "
            f"GPTQ needs full ones of {width} inputs and at least 1 token"
        )
    if not act_order:
        return torch.arange(width)
    return moments.squares.argsort(descending=True, stable=True)


def _finite(weight: torch.Tensor, name: str) -> torch.Tensor:
    """A copy in float64."""
    if not bool(weight.isfinite().all()):
        raise refusal(weight, name)
    return weight.to(torch.float64, memory_format=torch.contiguous_format, copy=True)


def _fit(
    members: torch.Tensor,
    squares: torch.Tensor,
    largest_code: int,
    weight: torch.Tensor,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """members [n, groups] float64: the values of each group; squares [n]: how much each counts.

    -> scales float16, divisors and zeros float64, each [groups]: of the ranges of SHRINKS, that with the least
    sum of squared errors of members rounded to nearest. The largest values are cut off where the rest gains more.
    """
    least, largest = members.amin(0).clamp_(max=0), members.amax(0).clamp_(min=0)
    shrinks = SHRINKS[:, None]
    scales = _scales(shrinks * least, shrinks * largest, largest_code, weight, name)
    steps = divisors(scales).double()
    zeros = (-shrinks * least / steps).round_()
    codes = _codes(members, steps[:, None], zeros[:, None], largest_code)  # [shrinks, n, groups]
    values = codes.sub_(zeros[:, None]).mul_(scales[:, None])
    errors = values.sub_(members).square_().mul_(squares[:, None]).sum(dim=1)
    best = errors.argmin(dim=0, keepdim=True)  # the first of equals, the widest
    scales, steps, zeros = (own.gather(0, best)[0] for own in (scales, steps, zeros))
    return scales, steps, zeros


def _scales(
    least: torch.Tensor, largest: torch.Tensor, largest_code: int, weight: torch.Tensor, name: str
) -> torch.Tensor:
    scales = group_scales(least, largest, largest_code)
    if not bool(scales.isfinite().all()):
        raise refusal(weight, name)
    return scales


def _codes(
    values: torch.Tensor, steps: torch.Tensor, zeros: torch.Tensor, largest_code: int
) -> torch.Tensor:
    return (values / steps).round_().add_(zeros).clamp_(0, largest_code)
