"""The packed layout, read back through the structs that the library is given."""

import ctypes
import gc
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from sparse_kernels import _abi, arena
from sparse_kernels.arena import Arena, huge_pages
from sparse_kernels.pack import NonFiniteWeights, PackedDecoder, pack, row_stride
from sparse_kernels.weights import LayerShape, LayerTensors

UNEVEN = (LayerShape(3, 1, 33, window=7), LayerShape(4, 2, 1))


def elements(matrix: _abi.sk_matrix) -> torch.Tensor:
    """All that belongs to a matrix, [rows in whole tiles, elements of a stride]."""
    assert matrix.abi_version == _abi.SK_ABI_VERSION
    assert matrix.struct_size == ctypes.sizeof(_abi.sk_matrix)
    raw = (ctypes.c_uint8 * matrix.bytes).from_address(matrix.data)
    flat = torch.frombuffer(raw, dtype=torch.bfloat16)
    return flat.view(-1, matrix.row_stride // 2)


def numbers(pointer: "ctypes._Pointer[ctypes.c_float]", count: int) -> torch.Tensor:
    return torch.tensor(pointer[:count])


def only(matrix: _abi.sk_matrix, places: list[tuple[slice, slice, torch.Tensor]]) -> None:
    """`places` hold these weights, all else is zero."""
    rest = elements(matrix).clone()
    for rows, columns, expected in places:
        assert torch.equal(rest[rows, columns], expected)
        rest[rows, columns] = 0
    assert not rest.any()


@pytest.mark.parametrize("head_dim", [6, 16, 20])
@pytest.mark.parametrize("hidden", [48, 64, 100])
def test_every_weight_is_in_its_place_and_the_padding_is_zero(tiny_decoder, hidden, head_dim):
    tiny = tiny_decoder(
        hidden_size=hidden, head_dim=head_dim, layers=UNEVEN, biases=True, head_norms=True
    )
    packed = tiny.packed()
    head, wide = -(-head_dim // 16) * 16, -(-hidden // 32) * 32
    for shape, tensors, layer in zip(UNEVEN, tiny.layers, packed.layers, strict=True):
        counts = (layer.num_heads, layer.num_kv_heads, layer.intermediate_size, layer.window)
        expected = (shape.num_heads, shape.num_kv_heads, shape.intermediate_size, shape.window)
        assert counts == expected
        joined = torch.cat((tensors.q, tensors.k, tensors.v))
        bias = torch.cat((tensors.q_bias, tensors.k_bias, tensors.v_bias))
        heads = len(joined) // head_dim
        at = [slice(i * head_dim, (i + 1) * head_dim) for i in range(heads)]
        places = [slice(i * head, i * head + head_dim) for i in range(heads)]
        columns = slice(0, hidden)
        only(layer.qkv, [(p, columns, joined[a]) for p, a in zip(places, at, strict=True)])
        padded = torch.zeros(heads * head)
        for place, own in zip(places, at, strict=True):
            padded[place] = bias[own]
        assert torch.equal(numbers(layer.qkv_bias, heads * head), padded)
        q, neurons = tensors.output.shape[1], slice(0, shape.intermediate_size)
        only(layer.output, [(columns, slice(0, q), tensors.output)])
        only(layer.gate, [(neurons, columns, tensors.gate)])
        up, down = columns, slice(wide, wide + hidden)
        only(layer.up_down, [(neurons, up, tensors.up), (neurons, down, tensors.down.T)])
        sizes = [(m.rows, m.columns) for m in (layer.qkv, layer.output, layer.gate, layer.up_down)]
        assert sizes[:2] == [(heads * head, hidden), (hidden, q)]
        assert sizes[2:] == [
            (-(-shape.intermediate_size // 32) * 32, n) for n in (hidden, 2 * wide)
        ]
        for name in ("attention_norm", "mlp_norm", "output_bias", "q_norm", "k_norm"):
            values = getattr(tensors, name)
            assert torch.equal(numbers(getattr(layer, name), len(values)), values)
    only(packed.embedding, [(slice(0, 50), slice(0, hidden), tiny.ends.embedding)])
    only(packed.lm_head, [(slice(0, 50), slice(0, hidden), tiny.ends.lm_head)])
    assert torch.equal(packed.norm, tiny.ends.norm)


def test_what_a_model_does_not_have_is_null_and_a_tied_head_is_the_embedding(tiny_decoder):
    packed: PackedDecoder = tiny_decoder(tied=True).packed()
    for name in ("qkv_bias", "output_bias", "q_norm", "k_norm"):
        assert not getattr(packed.layers[0], name)
    assert packed.lm_head.data == packed.embedding.data


@pytest.mark.parametrize("rows", [1, 3])
def test_frequencies_are_copied_whatever_memory_they_share(tiny_decoder, rows):
    tiny = tiny_decoder(rope_rows=2)
    row = tiny.config.rope_frequencies[1]
    config = replace(tiny.config, rope_frequencies=row.expand(rows, -1) if rows > 1 else row)
    packed = pack(config, tiny.ends, tiny.layers)
    assert packed.rope_frequencies.is_contiguous()
    assert torch.equal(packed.rope_frequencies, row.expand(rows, -1))


def all_matrices(packed: PackedDecoder) -> list[_abi.sk_matrix]:
    names = ("qkv", "output", "gate", "up_down")
    layers = [getattr(layer, name) for layer in packed.layers for name in names]
    return [packed.embedding, packed.lm_head, *layers]


@pytest.mark.parametrize("hidden", [32, 1000, 1024, 2048])
def test_rows_are_aligned_in_whole_tiles_and_never_2048_bytes_apart(tiny_decoder, hidden):
    packed = tiny_decoder(hidden_size=hidden, layers=UNEVEN, vocab_size=33).packed()
    spans = []
    for matrix in all_matrices(packed):
        assert matrix.data % _abi.SK_ALIGNMENT == matrix.row_stride % _abi.SK_ALIGNMENT == 0
        assert matrix.row_stride % 2048 != 0
        room = -(-matrix.columns // _abi.SK_COLUMN_TILE) * _abi.SK_COLUMN_TILE * 2
        assert room <= matrix.row_stride <= room + _abi.SK_ALIGNMENT
        rows = -(-matrix.rows // _abi.SK_ROW_TILE) * _abi.SK_ROW_TILE
        assert matrix.bytes == rows * matrix.row_stride
        spans.append((matrix.data, matrix.data + matrix.bytes))
    spans.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), "pieces overlap"


def test_the_line_more_is_only_where_rows_would_collide():
    assert [row_stride(n) for n in (1, 32, 33, 992, 1024, 1536, 2048)] == [
        64, 64, 128, 1984, 2112, 3072, 4160,
    ]  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [field.name for field in fields(LayerTensors)])
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


@pytest.mark.parametrize("name", [field.name for field in fields(LayerTensors)])
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
