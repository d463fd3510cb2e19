"""The packed layout, read back through the structs that the library is given."""

import ctypes
import gc
import itertools
import os
import weakref
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_kernels import _abi, arena, reference
from sparse_kernels.arena import Arena, huge_pages, trim_heap
from sparse_kernels.formats import DecoderFormats, MatrixFormat
from sparse_kernels.matrix import row_layout
from sparse_kernels.pack import PackedDecoder, pack
from sparse_kernels.weights import LayerShape, LayerTensors, Matrix, NonFiniteWeights

# What every quantized layer may lack: the bases of low-rank terms are tested with these.
TENSORS = [field.name for field in fields(LayerTensors) if not field.name.endswith("_basis")]
UNEVEN = (LayerShape(3, 1, 33, window=7), LayerShape(4, 2, 65))
INT8, INT4 = MatrixFormat(8, 64), MatrixFormat(4, 64)
INT8_SPLIT, INT4_HALVES, INT4_LOWEST = (
    MatrixFormat(8, 32, low_bits=4),
    MatrixFormat(4, 64, low_bits=2),
    MatrixFormat(4, 128, low_bits=1),
)
PLANS = {
    "bfloat16": DecoderFormats(),
    "int8": DecoderFormats(INT8, INT8, INT8, INT8),
    "int4, groups of 32": DecoderFormats(*4 * [MatrixFormat(4, 32)]),
    "int4, groups of 128, head int8": DecoderFormats(*3 * [MatrixFormat(4, 128)], INT8),
    "4 + 4": DecoderFormats(INT8, INT8_SPLIT, INT8, INT8_SPLIT),
    "2 + 2": DecoderFormats(INT4, INT4_HALVES, INT4, INT8),
    "3 + 1, down too": DecoderFormats(INT4_LOWEST, INT4_LOWEST, INT4_LOWEST, INT4_LOWEST),
    "feed-forward alone": DecoderFormats(gate_up=INT4, down=INT8),
    "down alone": DecoderFormats(down=INT8_SPLIT),
    "attention and head": DecoderFormats(attention=INT4_HALVES, lm_head=INT8),
    "int8 and rank 32": DecoderFormats(*3 * [MatrixFormat(8, 64, rank=32)], INT8),
    "other ranks": DecoderFormats(
        MatrixFormat(4, 32, rank=96), MatrixFormat(4, 128, 1, 64), MatrixFormat(8, 128, 4, 160)
    ),
}


def read_plane(plane: _abi.sk_plane, rows: int, columns: int) -> np.ndarray:
    """Elements [rows, columns], bit by bit from what sk_plane tells; bfloat16 as its 16 bits."""
    assert (plane.abi_version, plane.struct_size) == (
        _abi.SK_ABI_VERSION,
        ctypes.sizeof(_abi.sk_plane),
    )
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * plane.bytes).from_address(plane.data))
    row, column = np.indices((rows, columns))
    tile, c = column // 64, column % 64

    def bits(
        first: int, of_tile: int, byte: np.ndarray, shift: np.ndarray | int, count: int
    ) -> Any:
        at = row * plane.row_stride + tile * of_tile + first + byte
        return raw[at].astype(int) >> shift & (1 << count) - 1

    match plane.bits:
        case 16:
            return bits(0, 128, 2 * c, 0, 8) | bits(0, 128, 2 * c + 1, 0, 8) << 8
        case 8:
            return bits(0, 64, c, 0, 8)
        case 4:
            return bits(0, 32, c % 32, 4 * (c // 32), 4)
        case 3:
            upper = bits(0, 24, c % 16, 2 * (c // 16), 2)
            return upper << 1 | bits(16, 24, c // 8, c % 8, 1)
        case 2:
            return bits(0, 16, c % 16, 2 * (c // 16), 2)
        case 1:
            return bits(0, 8, c // 8, c % 8, 1)
    raise AssertionError(f"a plane of {plane.bits} bits")


def stored(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def first_factor(matrix: _abi.sk_matrix) -> int:
    """The column where the factors of its low-rank term begin."""
    return stored(matrix.columns, max(64, matrix.group_size))


def stored_columns(matrix: _abi.sk_matrix) -> int:
    if not matrix.rank:
        return stored(matrix.columns, 64)
    bits = matrix.codes.bits + (matrix.low.bits if matrix.low.data else 0)
    return first_factor(matrix) + stored(matrix.rank * 8 // bits, 64)


def read_matrix(matrix: _abi.sk_matrix) -> torch.Tensor:
    """The numbers that a matrix holds, float64 [rows and columns in whole tiles]."""
    assert matrix.abi_version == _abi.SK_ABI_VERSION
    assert matrix.struct_size == ctypes.sizeof(_abi.sk_matrix)
    rows, columns = stored(matrix.rows, 16), stored_columns(matrix)
    codes = read_plane(matrix.codes, rows, columns)
    if matrix.codes.bits == 16:
        assert not matrix.scales
        assert not matrix.zeros
        assert (matrix.group_size, matrix.scales_count, matrix.zeros_count) == (0, 0, 0)
        return (
            torch.from_numpy(codes.astype(np.uint16).view(np.int16)).view(torch.bfloat16).double()
        )
    if matrix.low.data:
        codes = codes << matrix.low.bits | read_plane(matrix.low, rows, columns)
    groups = -(-columns // matrix.group_size)
    assert matrix.scales_count == matrix.zeros_count == rows * groups
    scales = np.array(matrix.scales[: rows * groups], np.uint16).view(np.float16)
    zeros = np.array(matrix.zeros[: rows * groups])
    row, column = np.indices((rows, columns))
    place = (row // 16 * groups + column // matrix.group_size) * 16 + row % 16
    return torch.from_numpy(scales[place].astype(float) * (codes - zeros[place]))


def numbers(pointer: "ctypes._Pointer[ctypes.c_float]", count: int) -> torch.Tensor:
    return torch.tensor(pointer[:count])


def only(
    matrix: _abi.sk_matrix, places: list[tuple[slice, Matrix]], rows: int, columns: int
) -> None:
    """`places` (rows, and what they hold) are these weights, all else that counts is zero."""
    assert (matrix.rows, matrix.columns) == (rows, columns)
    rest = read_matrix(matrix)
    for at, expected in places:
        assert torch.equal(rest[at, :columns], reference.exact(expected))
        rest[at, :columns] = 0
    # Integers beyond a row's end may be anything inside its last group.
    assert not rest[:, : columns if matrix.group_size else None].any()


@pytest.mark.parametrize("formats", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(("hidden", "head_dim"), [(48, 6), (64, 16), (100, 20), (576, 16)])
def test_every_weight_is_in_its_place_and_the_padding_is_zero(
    tiny_decoder, hidden, head_dim, formats
):
    tiny = tiny_decoder(
        hidden_size=hidden, head_dim=head_dim, layers=UNEVEN, biases=True, head_norms=True,
        formats=formats,
    )  # fmt: skip
    packed = tiny.packed()
    head = stored(head_dim, 16)
    for shape, tensors, layer in zip(UNEVEN, tiny.layers, packed.layers, strict=True):
        counts = (layer.num_heads, layer.num_kv_heads, layer.intermediate_size, layer.window)
        expected = (shape.num_heads, shape.num_kv_heads, shape.intermediate_size, shape.window)
        assert counts == expected
        joined = torch.cat([reference.exact(m) for m in (tensors.q, tensors.k, tensors.v)])
        bias = torch.cat((tensors.q_bias, tensors.k_bias, tensors.v_bias))
        heads = len(joined) // head_dim
        at = [slice(i * head_dim, (i + 1) * head_dim) for i in range(heads)]
        places = [slice(i * head, i * head + head_dim) for i in range(heads)]
        wanted = [(place, joined[own]) for place, own in zip(places, at, strict=True)]
        only(layer.qkv, wanted, heads * head, hidden)
        padded = torch.zeros(heads * head)
        for place, own in zip(places, at, strict=True):
            padded[place] = bias[own]
        assert torch.equal(numbers(layer.qkv_bias, heads * head), padded)
        only(layer.output, [(slice(hidden), tensors.output)], hidden, shape.num_heads * head_dim)
        neurons, rows = slice(shape.intermediate_size), stored(shape.intermediate_size, 64)
        down = reference.exact(tensors.down)
        down = down if formats.down.quantized else down.T
        for matrix, weights in (
            (layer.gate, tensors.gate),
            (layer.up, tensors.up),
            (layer.down, down),
        ):
            only(matrix, [(neurons, weights)], rows, hidden)
        for name in ("attention_norm", "mlp_norm", "output_bias", "down_bias", "q_norm", "k_norm"):
            values = getattr(tensors, name)
            assert torch.equal(numbers(getattr(layer, name), len(values)), values)
    only(packed.embedding, [(slice(50), tiny.ends.embedding)], 50, hidden)
    only(packed.lm_head, [(slice(50), tiny.ends.lm_head)], 50, hidden)
    assert torch.equal(packed.norm, tiny.ends.norm)


@pytest.mark.parametrize("formats", [f for f in PLANS.values() if f.down.rank])
@pytest.mark.parametrize("hidden", [64, 100])
def test_factors_of_a_low_rank_term_are_further_columns(tiny_decoder, hidden, formats):
    tiny = tiny_decoder(hidden_size=hidden, layers=UNEVEN, formats=formats)
    packed = tiny.packed()
    for tensors, layer in zip(tiny.layers, packed.layers, strict=True):
        matrices = {name: getattr(tensors, name) for name in ("output", "gate", "up", "down")}
        for name, matrix in matrices.items():
            found = getattr(layer, name)
            assert found.rank == matrix.factors.codes.shape[1]
            numbers = read_matrix(found)[:, first_factor(found) :]
            assert not numbers[len(matrix.codes) :].any()
            if matrix.bits == 4:
                upper, lower = numbers.view(len(numbers), -1, 2, 32).unbind(2)
                numbers = (16 * upper + lower).flatten(1)
            numbers = numbers[: len(matrix.codes), : found.rank]
            assert torch.equal(numbers.float(), matrix.factors.dequantize())
        for name in ("qkv_basis", "output_basis", "gate_up_basis", "down_basis"):
            own = getattr(tensors, name)
            only(getattr(layer, name), [(slice(len(own)), own)], *own.shape)


def test_a_low_rank_term_that_is_not_as_the_format_says_is_refused(tiny_decoder):
    tiny = tiny_decoder(formats=PLANS["int8 and rank 32"])
    good = tiny.layers[0]
    factors = good.gate.factors
    nan = good.down_basis.clone()
    nan[-1, -1] = float("nan")
    for changes, told in (
        ({"gate": replace(good.gate, factors=None)}, "gate has no low-rank term; its format asks for rank 32"),
        ({"up": replace(good.up, factors=replace(factors, codes=factors.codes[:, 1:]))}, "up's factors is .* expected"),
        ({"up": replace(good.up, factors=replace(factors, scales=factors.scales.float()))}, "up's factors' scales is"),
        ({"qkv_basis": None}, r"qkv_basis is missing; the formats ask for \[32, 64\]"),
        ({"output_basis": good.output_basis[:1]}, r"output_basis is .*expected torch.bfloat16 \[32, 64\]"),
        ({"down_basis": nan}, "down_basis holds values that are not finite"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"layer 0: {told}"):
            pack(tiny.config, tiny.ends, [replace(good, **changes)], tiny.formats)
    plain = tiny_decoder(formats=PLANS["int8"])
    with pytest.raises(ValueError, match="gate has a low-rank term; its format asks for rank 0"):
        pack(tiny.config, tiny.ends, [replace(plain.layers[0], gate=good.gate)], plain.formats)
    layer = replace(plain.layers[0], qkv_basis=good.qkv_basis)
    with pytest.raises(ValueError, match=r"qkv_basis is \[32, 64\]; the formats ask for none"):
        pack(tiny.config, tiny.ends, [layer], plain.formats)


@pytest.mark.parametrize("formats", PLANS.values(), ids=PLANS)
def test_planes_are_those_of_the_plan(tiny_decoder, formats):
    packed = tiny_decoder(formats=formats).packed()
    layer = packed.layers[0]
    for matrix, format in (
        (layer.qkv, formats.attention), (layer.output, formats.attention), (layer.gate, formats.gate_up),
        (layer.up, formats.gate_up), (layer.down, formats.down), (packed.lm_head, formats.lm_head),
    ):  # fmt: skip
        low = (matrix.low.bits,) if matrix.low.data else ()
        assert (matrix.codes.bits, *low) == format.planes
        assert (matrix.group_size, matrix.rank) == (format.group_size, format.rank)
    assert packed.embedding.codes.bits == 16


@pytest.mark.parametrize("formats", PLANS.values(), ids=PLANS)
def test_what_is_read_of_a_chosen_neuron_is_side_by_side(tiny_decoder, formats):
    layer = tiny_decoder(formats=formats, hidden_size=100).packed().layers[0]
    last = layer.up.low if layer.up.low.data else layer.up.codes
    assert layer.down.codes.row_stride == last.row_stride
    end = last.data + stored_columns(layer.up) * last.bits // 8
    assert 0 <= layer.down.codes.data - end < 64
    for matrix in [layer.gate, layer.up] if layer.up.low.data else [layer.gate]:
        width = stored_columns(matrix) * matrix.codes.bits // 8
        assert matrix.codes.row_stride == width, "nothing between its rows"


def test_what_a_model_does_not_have_is_null_and_a_tied_head_is_the_embedding(tiny_decoder):
    packed: PackedDecoder = tiny_decoder(tied=True).packed()
    for name in ("qkv_bias", "output_bias", "down_bias", "q_norm", "k_norm"):
        assert not getattr(packed.layers[0], name)
    assert packed.lm_head.codes.data == packed.embedding.codes.data


def test_a_quantized_head_has_a_table_of_its_own(tiny_decoder):
    tiny = tiny_decoder(tied=True, formats=DecoderFormats(lm_head=INT8))
    packed = tiny.packed()
    only(packed.embedding, [(slice(50), tiny.ends.embedding)], 50, 64)
    only(packed.lm_head, [(slice(50), tiny.ends.lm_head)], 50, 64)
    with pytest.raises(ValueError, match="the LM head is quantized and the embedding is not"):
        pack(tiny.config, replace(tiny.ends, lm_head=None), tiny.layers, tiny.formats)


@pytest.mark.parametrize("rows", [1, 3])
def test_frequencies_are_copied_whatever_memory_they_share(tiny_decoder, rows):
    tiny = tiny_decoder(rope_rows=2)
    row = tiny.config.rope_frequencies[1]
    config = replace(tiny.config, rope_frequencies=row.expand(rows, -1) if rows > 1 else row)
    packed = pack(config, tiny.ends, tiny.layers)
    assert packed.rope_frequencies.is_contiguous()
    assert torch.equal(packed.rope_frequencies, row.expand(rows, -1))


def all_planes(packed: PackedDecoder) -> list[tuple[_abi.sk_matrix, _abi.sk_plane]]:
    names = ("qkv", "output", "gate", "up", "down")
    layers = [getattr(layer, name) for layer in packed.layers for name in names]
    matrices = [packed.embedding, packed.lm_head, *layers]
    return [(m, plane) for m in matrices for plane in (m.codes, m.low) if plane.data]


@pytest.mark.parametrize("formats", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("hidden", [32, 1000, 1024, 2048, 4096])
def test_rows_are_aligned_and_never_2048_bytes_apart(tiny_decoder, hidden, formats):
    tiny = tiny_decoder(
        hidden_size=hidden, layers=[LayerShape(2, 1, 33)], vocab_size=33, formats=formats
    )
    packed = tiny.packed()
    for matrix, plane in all_planes(packed):
        tile = 64 * plane.bits // 8
        alignment = next(unit for unit in (64, 32, 8) if tile % unit == 0)
        assert plane.data % alignment == plane.row_stride % alignment == 0
        assert plane.row_stride % 2048 != 0
        rows, width = stored(matrix.rows, 16), stored_columns(matrix) // 64 * tile
        assert plane.bytes == (rows - 1) * plane.row_stride + width


@pytest.mark.parametrize("formats", PLANS.values(), ids=PLANS)
def test_no_two_pieces_share_a_byte(tiny_decoder, formats):
    tiny = tiny_decoder(hidden_size=100, layers=UNEVEN, formats=formats, biases=True)
    packed = tiny.packed()
    pieces = []
    for matrix, plane in all_planes(packed):
        width = stored_columns(matrix) * plane.bits // 8
        starts = range(plane.data, plane.data + plane.bytes, plane.row_stride)
        pieces += [(start, start + width) for start in starts]
    for matrix, _ in {ctypes.addressof(m): (m, p) for m, p in all_planes(packed)}.values():
        for values, size in ((matrix.scales, 2), (matrix.zeros, 1)):
            if values:
                start = ctypes.addressof(values.contents)
                pieces.append((start, start + size * matrix.scales_count))
    pieces.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(pieces))


@pytest.mark.parametrize("formats", PLANS.values(), ids=PLANS)
def test_the_arena_has_no_byte_too_many(tiny_decoder, formats):
    shapes = {"layers": UNEVEN, "biases": True, "head_norms": True, "hidden_size": 100}
    taken = tiny_decoder(**shapes, formats=formats).packed().arena
    with pytest.raises(MemoryError, match="has no room"):
        taken.take(1, torch.uint8)


@pytest.mark.parametrize(
    ("planes", "strides"),
    [
        ([16], [128, 128, 256, 2048 + 64, 4096 + 64]),
        ([8], [64, 64, 128, 1024, 2048 + 64]),
        ([4], [32, 32, 64, 512, 1024]),
        ([3], [24, 24, 48, 384, 768]),
        ([2], [16, 16, 32, 256, 512]),
        ([1], [8, 8, 16, 128, 256]),
        ([4, 4], [64, 64, 128, 1024, 2048 + 32]),
        ([4, 8], [128, 128, 192, 1536 + 0, 3072]),
        ([2, 4], [64, 64, 96, 768, 1536]),
        ([1, 4], [64, 64, 96, 640, 1280]),
    ],
    ids=str,
)
def test_rows_have_no_bytes_that_they_need_not(planes, strides):
    assert [
        row_layout([(bits, n) for bits in planes])[1] for n in (1, 64, 65, 1024, 2048)
    ] == strides
    begins, _ = row_layout([(bits, 576) for bits in planes])
    assert begins[0] == 0


def test_576_columns_of_4_bits_are_288_bytes():
    assert row_layout([(4, 576)]) == ([0], 288)
    assert row_layout([(4, 576), (4, 576)]) == ([0, 288], 576)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", TENSORS)
def test_a_weight_that_is_not_finite_is_refused_with_its_name(tiny_decoder, name, value):
    tiny = tiny_decoder(biases=True, head_norms=True)
    damaged = getattr(tiny.layers[1], name).clone()
    damaged.view(-1)[-1] = value
    tiny.layers[1] = replace(tiny.layers[1], **{name: damaged})
    with pytest.raises(NonFiniteWeights, match=f"^layer 1: {name} holds values"):
        tiny.packed()


@pytest.mark.parametrize("name", ["embedding", "norm", "lm_head"])
def test_the_same_holds_outside_the_layers(tiny_decoder, name):
    tiny = tiny_decoder()
    damaged = getattr(tiny.ends, name).clone()
    damaged.view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteWeights, match=f"^{name} holds"):
        pack(tiny.config, replace(tiny.ends, **{name: damaged}), tiny.layers)


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_would_be_broadcast_or_converted_is_refused(tiny_decoder, name):
    tiny = tiny_decoder(biases=True, head_norms=True)
    good = getattr(tiny.layers[0], name)
    for wrong in (good[:1], good.double()):
        with pytest.raises(ValueError, match=rf"^layer 0: {name} is .*; expected .*\["):
            pack(tiny.config, tiny.ends, [replace(tiny.layers[0], **{name: wrong}), tiny.layers[1]])


def test_biases_of_some_of_q_k_and_v_are_refused(tiny_decoder):
    tiny = tiny_decoder(biases=True)
    layers = [replace(tiny.layers[0], k_bias=None), tiny.layers[1]]
    with pytest.raises(ValueError, match="layer 0: of q_bias, k_bias and v_bias some are missing"):
        pack(tiny.config, tiny.ends, layers)


INTEGER_DAMAGE = {
    "bits": (lambda m: replace(m, bits=8), "is not in the format int4-g32"),
    "groups": (lambda m: replace(m, group_size=64), "is not in the format int4-g32"),
    "bfloat16": (lambda m: m.dequantize().bfloat16(), "is not in the format int4-g32"),
    "codes": (lambda m: replace(m, codes=m.codes[1:]), r"'s codes is torch.uint8 \["),
    "scales": (lambda m: replace(m, scales=m.scales[:, :1]), r"'s scales is torch.float16 \["),
    "zeros": (lambda m: replace(m, zeros=m.zeros.short()), r"'s zeros is torch.int16 \["),
    "a code too large": (lambda m: replace(m, codes=m.codes | 16), "has the code 31 in 4 bits"),
    "a zero too large": (lambda m: replace(m, zeros=m.zeros | 32), "has the zero .* in 4 bits"),
    "an infinite scale": (lambda m: replace(m, scales=m.scales / 0), "'s scales holds values that"),
}


@pytest.mark.parametrize(("damage", "told"), INTEGER_DAMAGE.values(), ids=INTEGER_DAMAGE)
@pytest.mark.parametrize("name", ["q", "v", "output", "up", "down"])
def test_integers_that_are_not_as_planned_are_refused_with_their_name(
    tiny_decoder, name, damage, told
):
    tiny = tiny_decoder(formats=DecoderFormats(*4 * [MatrixFormat(4, 32)]))
    wrong = damage(getattr(tiny.layers[1], name))
    tiny.layers[1] = replace(tiny.layers[1], **{name: wrong})
    with pytest.raises(ValueError, match=f"^layer 1: {name} ?{told}"):
        tiny.packed()


def test_integers_where_none_are_planned_are_refused(tiny_decoder):
    tiny = tiny_decoder(formats=DecoderFormats(down=INT8, lm_head=INT8))
    with pytest.raises(ValueError, match=r"^lm_head is not in the format bfloat16"):
        pack(tiny.config, tiny.ends, tiny.layers, DecoderFormats(down=INT8))
    with pytest.raises(ValueError, match=r"^layer 0: down is not in the format bfloat16"):
        pack(tiny.config, tiny.ends, tiny.layers, DecoderFormats(lm_head=INT8))


def test_layers_are_not_kept_while_others_are_read(tiny_decoder):
    tiny = tiny_decoder(layers=[LayerShape(4, 2, 96)] * 6)
    seen: list[weakref.ref[torch.Tensor]] = []

    def read() -> Iterator[LayerTensors]:
        for layer in tiny.layers:
            assert sum(ref() is not None for ref in seen) == 0, "an earlier one is alive"
            copy = replace(layer, gate=layer.gate.clone())
            seen.append(weakref.ref(copy.gate))
            yield copy
            del copy

    packed = pack(tiny.config, tiny.ends, read())
    gc.collect()
    assert [ref() for ref in seen] == [None] * 6
    assert len(packed.layers) == 6


class TestArena:
    def test_begins_at_a_huge_page_and_is_zero(self):
        memory = huge_pages((3 << 20) + 5)
        assert len(memory) == (3 << 20) + 5
        assert memory.data_ptr() % (2 << 20) == 0
        assert not memory.any()

    def test_asks_for_huge_pages(self):
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
        if not setting.is_file() or "[never]" in setting.read_text():
            pytest.skip("this kernel gives no huge pages")
        memory = huge_pages(8 << 20).fill_(1)
        assert "hg" in vm_flags(memory.data_ptr())

    def test_goes_back_to_the_system_with_its_last_tensor(self):
        memory = huge_pages(8 << 20).fill_(1)
        address, view = memory.data_ptr(), memory[-1:]
        del memory
        gc.collect()
        assert vm_flags(address)
        del view
        gc.collect()
        assert not vm_flags(address)

    def test_pieces_are_aligned_and_end_with_the_arena(self):
        arena = Arena(256)
        pieces = [arena.take(size, torch.float32) for size in (4, 64, 68)]
        starts = [piece.data_ptr() - pieces[0].data_ptr() for piece in pieces]
        assert starts == [0, 64, 128]
        with pytest.raises(MemoryError, match="256 bytes has no room for 4 more"):
            arena.take(4, torch.float32)

    def test_more_than_this_process_can_get_is_refused(self, monkeypatch):
        monkeypatch.setattr(arena, "memory_room", lambda: 1000)
        with pytest.raises(MemoryError, match=r"1001 bytes are needed.* only 1000 more"):
            huge_pages(1001)


def vm_flags(address: int) -> list[str]:
    """What /proc tells of the mapping that holds an address; nothing where there is none."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(bound, 16) for bound in head.split("-"))
            inside = first <= address < last
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    return []

    def test_memory_that_was_freed_goes_back_to_the_system(self):
        def resident() -> int:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE")

        pieces = [bytearray(100_000) for _ in range(1000)]  # too small for maps of their own
        for piece in pieces:
            piece[::4096] = b"x" * len(piece[::4096])
        last = bytearray(100_000)  # the heap cannot simply end earlier
        full = resident()
        del pieces, piece
        trim_heap()
        assert resident() < full - 50e6
        assert last
