"""Matrices in the layout of the library: planes of bits, and scales and zeros by tiles of rows.

The layout is told in include/sparse_kernels.h.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from sparse_kernels import _abi
from sparse_kernels.arena import Arena, aligned
from sparse_kernels.formats import MatrixFormat
from sparse_kernels.native import new_struct
from sparse_kernels.weights import FACTOR_ZERO, Matrix, QuantizedMatrix

# Elements whose bits are put into place at once: their temporaries stay in a cache.
BLOCK_ELEMENTS = 1 << 18

PlaneShape = tuple[int, int]  # bits, columns


@dataclass(frozen=True, slots=True)
class Plane:
    """Zeroed memory for some bits of each element of a matrix."""

    bits: int
    rows: torch.Tensor  # uint8 [rows in whole tiles, bytes of whole tiles of columns]

    def describe(self) -> _abi.sk_plane:
        plane = new_struct(_abi.sk_plane)
        count, width = self.rows.shape
        plane.data, plane.bits = self.rows.data_ptr(), self.bits
        plane.row_stride = self.rows.stride(0)
        plane.bytes = (count - 1) * plane.row_stride + width
        return plane


def row_layout(planes: Sequence[PlaneShape]) -> tuple[list[int], int]:
    """Of planes side by side in each row: bytes at which each begins, and the row stride.

    A dot product reads a tile of rows side by side. The L1 cache picks a line's place by the low 12
    bits of its address, so rows a multiple of 2048 bytes apart would all compete for two of its 64 sets;
    half a line or more in each row spreads them.
    """
    begins, end = [], 0
    for bits, columns in planes:
        begins.append(aligned(end, _unit(bits)))
        end = begins[-1] + _row_bytes(columns, bits)
    step = max(_unit(bits) for bits, _ in planes)
    stride = aligned(end, step)
    return begins, stride if stride % 2048 else stride + max(step, _abi.SK_ALIGNMENT // 2)


def stored_columns(columns: int, format: MatrixFormat) -> int:
    """Of a matrix with this many, in whole tiles, its low-rank term's among them."""
    if not format.rank:
        return aligned(columns, _abi.SK_COLUMN_TILE)
    return _first_factor(columns, format) + format.factor_columns


def plane_shapes(columns: int, format: MatrixFormat) -> list[PlaneShape]:
    """Of a matrix with this many columns, those of its low-rank term not counted."""
    return [(bits, stored_columns(columns, format)) for bits in format.planes]


def planes_bytes(rows: int, planes: Sequence[PlaneShape]) -> int:
    """What `side_by_side` takes from an arena."""
    return aligned(_stored_rows(rows) * row_layout(planes)[1])


def side_by_side(arena: Arena, rows: int, planes: Sequence[PlaneShape]) -> list[Plane]:
    """Room for the elements of several planes, those of a row one after another."""
    begins, stride = row_layout(planes)
    records = arena.take(_stored_rows(rows) * stride, torch.uint8).view(-1, stride)
    return [
        Plane(bits, records[:, begin : begin + _row_bytes(columns, bits)])
        for (bits, columns), begin in zip(planes, begins, strict=True)
    ]


def on_their_own(arena: Arena, rows: int, planes: Sequence[PlaneShape]) -> list[Plane]:
    """Room for the elements of several planes, each in one piece."""
    return [plane for shape in planes for plane in side_by_side(arena, rows, [shape])]


def matrix_bytes(rows: int, columns: int, format: MatrixFormat) -> int:
    """Of a matrix whose planes are on their own, with its scales and zeros."""
    planes = sum(planes_bytes(rows, [shape]) for shape in plane_shapes(columns, format))
    return planes + scales_bytes(rows, columns, format)


def scales_bytes(rows: int, columns: int, format: MatrixFormat) -> int:
    """Of scales and zeros; 0 with bfloat16."""
    count = math.prod(_scales_shape(rows, columns, format))
    return aligned(2 * count) + aligned(count)


def fill_matrix(
    arena: Arena,
    source: Matrix,
    rows: int,
    columns: int,
    format: MatrixFormat,
    planes: Sequence[Plane] | None = None,
) -> _abi.sk_matrix:
    """Copy `source` into the library's layout; it is of `format` and has at most `rows` rows, the
    others are zero. Without `planes` they are on their own.
    """
    planes = planes or on_their_own(arena, rows, plane_shapes(columns, format))
    matrix = new_struct(_abi.sk_matrix)
    matrix.rows, matrix.columns, matrix.group_size = rows, columns, format.group_size
    matrix.rank = format.rank
    matrix.codes, matrix.low = planes[0].describe(), new_struct(_abi.sk_plane)
    if len(planes) > 1:
        matrix.low = planes[1].describe()
    if isinstance(source, QuantizedMatrix):
        source = _with_factor_columns(source, format)
        _fill_codes(source.codes, planes)
        shape = _scales_shape(rows, columns, format)
        count = math.prod(shape)
        scales = _fill_by_tiles(arena.take(2 * count, torch.float16).view(shape), source.scales)
        zeros = _fill_by_tiles(arena.take(count, torch.uint8).view(shape), source.zeros)
        matrix.scales = ctypes.cast(scales.data_ptr(), ctypes.POINTER(ctypes.c_uint16))
        matrix.zeros = ctypes.cast(zeros.data_ptr(), ctypes.POINTER(ctypes.c_uint8))
        matrix.scales_count = matrix.zeros_count = count
    else:
        numbers = planes[0].rows.view(torch.bfloat16)
        numbers[: len(source), : source.shape[1]] = source
    return matrix


def _first_factor(columns: int, format: MatrixFormat) -> int:
    """The column where a low-rank term's factors begin, in a group of their own."""
    return aligned(aligned(columns, _abi.SK_COLUMN_TILE), format.group_size)


def _with_factor_columns(source: QuantizedMatrix, format: MatrixFormat) -> QuantizedMatrix:
    """The factors of its low-rank term become further columns of a matrix, as sk_matrix tells."""
    if source.factors is None:
        return source
    codes, halves = source.factors.codes, 8 // format.bits
    if halves == 2:
        by_tile = codes.reshape(len(codes), -1, 1, _abi.SK_RANK_TILE)
        codes = torch.cat((by_tile >> 4, by_tile & 15), dim=2).flatten(1)
    columns = source.codes.shape[1]
    first = _first_factor(columns, format)
    codes = F.pad(codes, (0, format.factor_columns - codes.shape[1]))
    groups = (len(codes), format.groups(format.factor_columns))
    missing = first // format.group_size - source.scales.shape[1]
    zero = FACTOR_ZERO if halves == 1 else FACTOR_ZERO // 17
    return replace(
        source,
        codes=torch.cat((F.pad(source.codes, (0, first - columns)), codes), dim=1),
        scales=torch.cat(
            (F.pad(source.scales, (0, missing)), source.factors.scales[:, None].expand(groups)),
            dim=1,
        ),
        zeros=F.pad(F.pad(source.zeros, (0, missing)), (0, groups[1]), value=zero),
        factors=None,
    )


def _fill_codes(codes: torch.Tensor, planes: Sequence[Plane]) -> None:
    """codes [rows, columns] uint8, the upper bits for the first plane."""
    missing = -codes.shape[1] % _abi.SK_COLUMN_TILE
    step = max(1, BLOCK_ELEMENTS // (codes.shape[1] + missing))
    for begin in range(0, len(codes), step):
        block = codes[begin : begin + step]
        if missing:
            block = F.pad(block, (0, missing))
        below = 0  # bits in the planes after this one
        for plane in reversed(planes):
            own = block if len(planes) == 1 else block >> below & ((1 << plane.bits) - 1)
            plane.rows[begin : begin + len(block)] = _in_tiles(own, plane.bits)
            below += plane.bits


def _in_tiles(values: torch.Tensor, bits: int) -> torch.Tensor:
    """values [rows, columns in whole tiles] uint8 below 2^bits -> [rows, bytes] as sk_plane tells."""
    return _tile(values.view(len(values), -1, _abi.SK_COLUMN_TILE), bits).flatten(1)


def _tile(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, tiles, SK_COLUMN_TILE] -> [rows, tiles, bytes of a tile]."""
    match bits:
        case 8:
            return values
        case 4:
            first, second = values.chunk(2, dim=2)
            return first | second << 4
        case 3:
            return torch.cat((_tile(values >> 1, 2), _tile(values & 1, 1)), dim=2)
        case 2:
            a, b, c, d = values.chunk(4, dim=2)
            return a | b << 2 | c << 4 | d << 6
        case 1:
            a, b, c, d, e, f, g, h = values.view(*values.shape[:2], -1, 8).unbind(3)
            return a | b << 1 | c << 2 | d << 3 | e << 4 | f << 5 | g << 6 | h << 7
    raise ValueError(f"there are no planes of {bits} bits")


def _fill_by_tiles(out: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """values [rows, groups] into out [row tiles, groups, SK_ROW_TILE], both sizes at most."""
    _, groups, tile = out.shape
    padded = F.pad(values, (0, groups - values.shape[1], 0, -len(values) % tile))
    by_tile = padded.view(-1, tile, groups).transpose(1, 2)
    out[: len(by_tile)] = by_tile
    return out


def _scales_shape(rows: int, columns: int, format: MatrixFormat) -> tuple[int, int, int]:
    """Row tiles, groups, rows of a tile."""
    groups = format.groups(stored_columns(columns, format))
    return _stored_rows(rows) // _abi.SK_ROW_TILE, groups, _abi.SK_ROW_TILE


def _stored_rows(rows: int) -> int:
    return aligned(rows, _abi.SK_ROW_TILE)


def _row_bytes(columns: int, bits: int) -> int:
    """Of whole tiles of columns."""
    return aligned(columns, _abi.SK_COLUMN_TILE) * bits // 8


def _unit(bits: int) -> int:
    """Alignment that the library asks for in a plane of these bits: a tile's, at most a line."""
    return math.gcd(_abi.SK_COLUMN_TILE * bits // 8, _abi.SK_ALIGNMENT)
