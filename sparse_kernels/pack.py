"""Weights in the layout of the native decoder, all of a model in one arena.

The layout is told in include/sparse_kernels.h: rows in whole tiles, heads and neurons padded with
zeros, what is read of a neuron after it was chosen side by side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import repeat
from typing import cast

import torch
import torch.nn.functional as F

from sparse_kernels import _abi
from sparse_kernels.arena import Arena, aligned
from sparse_kernels.choice import ChoiceKind
from sparse_kernels.formats import BFLOAT16, SCAN, DecoderFormats, LayerFormats, MatrixFormat
from sparse_kernels.matrix import (
    PlaneShape,
    fill_matrix,
    matrix_bytes,
    on_their_own,
    plane_shapes,
    planes_bytes,
    scales_bytes,
    side_by_side,
)
from sparse_kernels.native import new_struct
from sparse_kernels.weights import (
    ChoiceTensors,
    DecoderConfig,
    EndTensors,
    Factors,
    LayerShape,
    LayerTensors,
    Matrix,
    NonFiniteWeights,
    QuantizedMatrix,
    ScanTensors,
)


@dataclass(frozen=True, slots=True)
class PackedDecoder:
    """What sk_model_create is told of the weights. The pointers hold as long as `arena` lives."""

    config: DecoderConfig
    formats: DecoderFormats
    arena: Arena
    rope_frequencies: torch.Tensor  # [rows, head_dim / 2]
    layers: ctypes.Array[_abi.sk_layer]
    norm: torch.Tensor
    embedding: _abi.sk_matrix
    lm_head: _abi.sk_matrix
    scan: PackedScan | None = None
    choice: PackedChoice | None = None


@dataclass(frozen=True, slots=True)
class PackedScan:
    """A coarse copy of the LM head, in an arena of its own."""

    arena: Arena
    matrix: _abi.sk_matrix
    basis: _abi.sk_matrix
    errors: torch.Tensor  # [2, vocab]


@dataclass(frozen=True, slots=True)
class PackedChoice:
    """What choices of neurons go by, in an arena of its own."""

    arena: Arena
    kinds: frozenset[ChoiceKind]  # that sequences can choose by
    corrections: ctypes.Array[_abi.sk_correction]  # [num_corrections * layers]
    num_corrections: int


def pack(
    config: DecoderConfig,
    ends: EndTensors,
    layers: Iterable[LayerTensors],
    formats: DecoderFormats = DecoderFormats(),
) -> PackedDecoder:
    """Copy all weights, which are in `formats`, into an arena of their own.

    Layers are taken one at a time and none is kept, so that an iterator that reads them needs memory
    for one. Raises NonFiniteWeights, ValueError where a tensor has another shape or format than asked
    for, MemoryError.
    """
    formats.check_layers(len(config.layers))
    plans = [formats.layer(index) for index in range(len(config.layers))]
    vocab = (config.vocab_size, config.hidden_size)
    frequencies = config.rope_frequencies.view(-1, config.head_dim // 2)
    tables = matrix_bytes(*vocab, BFLOAT16)
    if ends.lm_head is not None:
        tables += matrix_bytes(*vocab, formats.lm_head)
    vectors = _vector_bytes(config.hidden_size) + _vector_bytes(frequencies.numel())
    sizes = map(_layer_bytes, repeat(config), config.layers, plans)
    arena = Arena(tables + vectors + sum(sizes))
    frequencies = _vector(arena, frequencies.numel()).view_as(frequencies).copy_(frequencies)
    _check_matrix("embedding", ends.embedding, vocab, BFLOAT16)
    embedding = lm_head = fill_matrix(arena, ends.embedding, *vocab, BFLOAT16)
    if ends.lm_head is not None:
        _check_matrix("lm_head", ends.lm_head, vocab, formats.lm_head)
        lm_head = fill_matrix(arena, ends.lm_head, *vocab, formats.lm_head)
    elif formats.lm_head.quantized:
        raise ValueError("the LM head is quantized and the embedding is not; give it as lm_head")
    _check_tensor("norm", ends.norm, (config.hidden_size,), torch.float32)
    norm = _vector(arena, config.hidden_size).copy_(ends.norm)
    structs = (_abi.sk_layer * len(config.layers))()
    source = iter(layers)
    # zip would hold a layer while it asks for another.
    for index, (shape, plan) in enumerate(zip(config.layers, plans, strict=True)):
        structs[index] = _pack_layer(arena, config, shape, plan, next(source), f"layer {index}: ")
    return PackedDecoder(config, formats, arena, frequencies, structs, norm, embedding, lm_head)


def with_scan(packed: PackedDecoder, tensors: ScanTensors) -> PackedDecoder:
    """The same decoder with a coarse copy of its LM head. Raises as `pack`."""
    vocab, hidden = packed.config.vocab_size, packed.config.hidden_size
    columns = scan_columns(hidden)
    _check_matrix("scan", tensors.matrix, (vocab, columns), SCAN)
    _check_tensor("scan basis", tensors.basis, (_abi.SK_SCAN_DIRECTIONS, hidden), torch.bfloat16)
    _check_tensor("scan errors", tensors.errors, (2, vocab), torch.float32)
    directions = (_abi.SK_SCAN_DIRECTIONS, hidden)
    size = matrix_bytes(vocab, columns, SCAN) + matrix_bytes(*directions, BFLOAT16)
    arena = Arena(size + _vector_bytes(2 * vocab))
    matrix = fill_matrix(arena, tensors.matrix, vocab, columns, SCAN)
    basis = fill_matrix(arena, tensors.basis, *directions, BFLOAT16)
    errors = _vector(arena, 2 * vocab).view(2, vocab).copy_(tensors.errors)
    return replace(packed, scan=PackedScan(arena, matrix, basis, errors))


def with_choice(packed: PackedDecoder, tensors: ChoiceTensors) -> PackedDecoder:
    """The same decoder, whose sequences can choose neurons. Raises as `pack`."""
    config, layers = packed.config, len(packed.config.layers)
    widest = max(shape.intermediate_size for shape in config.layers)
    factors = {
        kind: values
        for kind, values in (
            (ChoiceKind.PLANES, tensors.planes_factors),
            (ChoiceKind.GATE, tensors.gate_factors),
        )
        if values is not None
    }
    rows, hidden = _abi.SK_MAX_CORRECTION_RANK, config.hidden_size
    corrections = (_abi.sk_correction * (layers * len(tensors.corrections)))()
    size = len(factors) * _vector_bytes(layers * widest)
    arena = Arena(size + 2 * len(corrections) * matrix_bytes(rows, hidden, BFLOAT16))
    structs = type(packed.layers)(*packed.layers)
    for kind, values in factors.items():
        _check_tensor(f"{kind.value} factors", values, (layers, widest), torch.float32)
        kept = _vector(arena, layers * widest).view(layers, widest).copy_(values)
        for struct, own in zip(structs, kept, strict=True):
            setattr(struct, f"{kind.value}_factors", pointer(own))
    each = [pair for correction in tensors.corrections for pair in correction]
    for index, (inputs, outputs) in enumerate(each):
        correction = corrections[index] = new_struct(_abi.sk_correction)
        correction.rank = len(inputs)
        for name, matrix in (("inputs", inputs), ("outputs", outputs)):
            _check_tensor(f"correction {name}", matrix, (len(inputs), hidden), torch.bfloat16)
            setattr(correction, name, fill_matrix(arena, matrix, rows, hidden, BFLOAT16))
        corrections[index] = correction
    choice = PackedChoice(arena, frozenset(factors), corrections, len(tensors.corrections))
    return replace(packed, layers=structs, choice=choice)


def scan_columns(hidden_size: int) -> int:
    """Of a scan: what multiplies the input, and its directions."""
    return aligned(hidden_size, _abi.SK_COLUMN_TILE) + _abi.SK_SCAN_DIRECTIONS


def pointer(tensor: torch.Tensor) -> ctypes._Pointer[ctypes.c_float]:
    """To a float32 tensor's first number, for a field of a struct; does not keep it alive."""
    return ctypes.cast(tensor.data_ptr(), ctypes.POINTER(ctypes.c_float))


def _vector_bytes(length: int) -> int:
    return aligned(4 * length)


def _vector(arena: Arena, length: int) -> torch.Tensor:
    """[length] float32."""
    return arena.take(4 * length, torch.float32)


def _padded_heads(config: DecoderConfig, shape: LayerShape) -> int:
    """Rows of the packed q, k and v."""
    heads = shape.num_heads + 2 * shape.num_kv_heads
    return heads * aligned(config.head_dim, _abi.SK_ROW_TILE)


def _padded_neurons(shape: LayerShape) -> int:
    return aligned(shape.intermediate_size, _abi.SK_NEURON_BLOCK)


def _up_planes(hidden: int, formats: LayerFormats) -> tuple[list[PlaneShape], list[PlaneShape]]:
    """Up's planes on their own, and those beside each other: what is read of a neuron once it is chosen.
    That is the last plane of up, and down."""
    *upper, last = plane_shapes(hidden, formats.gate_up)
    return upper, [last, *plane_shapes(hidden, formats.down)]


def _bases(
    config: DecoderConfig, shape: LayerShape, formats: LayerFormats
) -> dict[str, tuple[int, int]]:
    return formats.basis_shapes(config.hidden_size, shape.num_heads * config.head_dim)


def _layer_bytes(config: DecoderConfig, shape: LayerShape, formats: LayerFormats) -> int:
    """With room for all the vectors that a layer may have."""
    hidden, heads = config.hidden_size, _padded_heads(config, shape)
    neurons = (_padded_neurons(shape), hidden)
    upper, beside = _up_planes(hidden, formats)
    matrices = (
        matrix_bytes(heads, hidden, formats.attention),
        matrix_bytes(hidden, shape.num_heads * config.head_dim, formats.attention),
        matrix_bytes(*neurons, formats.gate_up),
        *(planes_bytes(neurons[0], [plane]) for plane in upper),
        planes_bytes(neurons[0], beside),
        scales_bytes(*neurons, formats.gate_up),
        scales_bytes(*neurons, formats.down),
        *(matrix_bytes(*basis, BFLOAT16) for basis in _bases(config, shape, formats).values()),
    )
    lengths = [*4 * [hidden], heads, *2 * [config.head_dim]]
    return sum(matrices) + sum(map(_vector_bytes, lengths))


def _pack_layer(
    arena: Arena,
    config: DecoderConfig,
    shape: LayerShape,
    formats: LayerFormats,
    tensors: LayerTensors,
    where: str,
) -> _abi.sk_layer:
    _check_layer(config, shape, formats, tensors, where)
    layer = new_struct(_abi.sk_layer)
    layer.num_heads, layer.num_kv_heads = shape.num_heads, shape.num_kv_heads
    layer.intermediate_size, layer.window = shape.intermediate_size, shape.window
    heads, hidden, head_dim = _padded_heads(config, shape), config.hidden_size, config.head_dim
    qkv = _joined([tensors.q, tensors.k, tensors.v], head_dim)
    layer.qkv = fill_matrix(arena, qkv, heads, hidden, formats.attention)
    inputs = shape.num_heads * head_dim
    layer.output = fill_matrix(arena, tensors.output, hidden, inputs, formats.attention)
    _pack_feed_forward(arena, _padded_neurons(shape), hidden, formats, tensors, layer)
    for name, basis in _bases(config, shape, formats).items():
        setattr(layer, name, fill_matrix(arena, getattr(tensors, name), *basis, BFLOAT16))
    if tensors.q_bias is not None and tensors.k_bias is not None and tensors.v_bias is not None:
        bias = _by_head([tensors.q_bias, tensors.k_bias, tensors.v_bias], head_dim)
        layer.qkv_bias = pointer(_vector(arena, heads).copy_(bias))
    for name in ("attention_norm", "mlp_norm", "output_bias", "down_bias", "q_norm", "k_norm"):
        if (values := getattr(tensors, name)) is not None:
            setattr(layer, name, pointer(_vector(arena, len(values)).copy_(values)))
    return layer


def _pack_feed_forward(
    arena: Arena,
    neurons: int,
    hidden: int,
    formats: LayerFormats,
    tensors: LayerTensors,
    layer: _abi.sk_layer,
) -> None:
    """Sets gate, up and down of `layer`."""
    upper, beside = _up_planes(hidden, formats)
    high = on_their_own(arena, neurons, upper)
    low, *rest = side_by_side(arena, neurons, beside)
    down = tensors.down if isinstance(tensors.down, QuantizedMatrix) else tensors.down.T
    layer.gate = fill_matrix(arena, tensors.gate, neurons, hidden, formats.gate_up)
    layer.up = fill_matrix(arena, tensors.up, neurons, hidden, formats.gate_up, [*high, low])
    layer.down = fill_matrix(arena, down, neurons, hidden, formats.down, rest)


def _joined(parts: Sequence[Matrix], head_dim: int) -> Matrix:
    """q, k and v as one matrix, each head padded to whole tiles of rows."""
    first = parts[0]
    if not isinstance(first, QuantizedMatrix):
        return _by_head(cast(Sequence[torch.Tensor], parts), head_dim)
    quantized = cast(Sequence[QuantizedMatrix], parts)
    codes, scales, zeros = (
        _by_head([getattr(part, name) for part in quantized], head_dim)
        for name in ("codes", "scales", "zeros")
    )
    factors = None
    if owns := [part.factors for part in quantized if part.factors is not None]:
        factors = Factors(
            _by_head([own.codes for own in owns], head_dim),
            _by_head([own.scales for own in owns], head_dim),
        )
    return replace(first, codes=codes, scales=scales, zeros=zeros, factors=factors)


def _by_head(parts: Sequence[torch.Tensor], head_dim: int) -> torch.Tensor:
    """[rows of heads, …], one after another, each head padded with zeros to whole tiles of rows."""
    rows = torch.cat(list(parts))
    heads = rows.view(-1, head_dim, *rows.shape[1:])
    missing = -head_dim % _abi.SK_ROW_TILE
    return F.pad(heads, (*(0, 0) * (heads.dim() - 2), 0, missing)).flatten(0, 1)


def _check_layer(
    config: DecoderConfig,
    shape: LayerShape,
    formats: LayerFormats,
    tensors: LayerTensors,
    where: str,
) -> None:
    """Raises ValueError or NonFiniteWeights. Assignments would broadcast what is too small."""
    hidden, neurons = config.hidden_size, shape.intermediate_size
    q, kv = shape.num_heads * config.head_dim, shape.num_kv_heads * config.head_dim
    attention, gate_up = formats.attention, formats.gate_up
    matrices: dict[str, tuple[tuple[int, int], MatrixFormat]] = {
        "q": ((q, hidden), attention), "k": ((kv, hidden), attention), "v": ((kv, hidden), attention),
        "output": ((hidden, q), attention), "gate": ((neurons, hidden), gate_up),
        "up": ((neurons, hidden), gate_up),
        "down": ((neurons, hidden) if formats.down.quantized else (hidden, neurons), formats.down),
    }  # fmt: skip
    vectors = {
        "attention_norm": hidden, "mlp_norm": hidden, "q_bias": q, "k_bias": kv, "v_bias": kv,
        "output_bias": hidden, "down_bias": hidden, "q_norm": config.head_dim, "k_norm": config.head_dim,
    }  # fmt: skip
    bases = _bases(config, shape, formats)
    for field in fields(tensors):
        name, value = where + field.name, getattr(tensors, field.name)
        if field.name in matrices:
            _check_matrix(name, value, *matrices[field.name])
        elif field.name.endswith("_basis"):
            _check_basis(name, value, bases.get(field.name))
        elif value is not None:
            _check_tensor(name, value, (vectors[field.name],), torch.float32)
    missing = [bias is None for bias in (tensors.q_bias, tensors.k_bias, tensors.v_bias)]
    if any(missing) and not all(missing):
        raise ValueError(f"{where}of q_bias, k_bias and v_bias some are missing; give all or none")


def _check_matrix(name: str, matrix: Matrix, shape: tuple[int, int], format: MatrixFormat) -> None:
    """Raises ValueError or NonFiniteWeights."""
    quantized = isinstance(matrix, QuantizedMatrix)
    if quantized != format.quantized or (
        isinstance(matrix, QuantizedMatrix)
        and (matrix.bits, matrix.group_size) != (format.bits, format.group_size)
    ):
        raise ValueError(f"{name} is not in the format {format}")
    if not isinstance(matrix, QuantizedMatrix):
        _check_tensor(name, matrix, shape, torch.bfloat16)
        return
    _check_factors(name, matrix.factors, shape[0], format.rank)
    groups = (shape[0], format.groups(shape[1]))
    _check_tensor(f"{name}'s codes", matrix.codes, shape, torch.uint8)
    _check_tensor(f"{name}'s scales", matrix.scales, groups, torch.float16)
    _check_tensor(f"{name}'s zeros", matrix.zeros, groups, torch.uint8)
    for what, values in (("code", matrix.codes), ("zero", matrix.zeros)):
        # A larger one would run into its neighbours' bits.
        if int(values.max()) >= 1 << format.bits:
            raise ValueError(f"{name} has the {what} {int(values.max())} in {format.bits} bits")


def _check_factors(name: str, factors: Factors | None, rows: int, rank: int) -> None:
    """Raises ValueError or NonFiniteWeights."""
    if (factors is None) != (rank == 0):
        has = "no" if factors is None else "a"
        raise ValueError(f"{name} has {has} low-rank term; its format asks for rank {rank}")
    if factors is None:
        return
    _check_tensor(f"{name}'s factors", factors.codes, (rows, rank), torch.uint8)
    _check_tensor(f"{name}'s factors' scales", factors.scales, (rows,), torch.float16)


def _check_basis(name: str, basis: torch.Tensor | None, shape: tuple[int, int] | None) -> None:
    """Raises ValueError or NonFiniteWeights."""
    if basis is None and shape is None:
        return
    if basis is None or shape is None:
        has = "missing" if basis is None else f"{list(basis.shape)}"
        raise ValueError(f"{name} is {has}; the formats ask for {list(shape) if shape else 'none'}")
    _check_tensor(name, basis, shape, torch.bfloat16)


def _check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Raises ValueError or NonFiniteWeights."""
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}"
        )
    # aminmax has NaN if one is, and takes a tenth of the time of isfinite over all.
    if dtype.is_floating_point and not all(end.isfinite() for end in tensor.aminmax()):
        raise NonFiniteWeights(f"{name} holds values that are not finite")
