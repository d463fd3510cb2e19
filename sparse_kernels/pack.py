"""Weights in the layout of the native decoder, all of a model in one arena.

The layout is told in include/sparse_kernels.h: rows in whole tiles, heads, columns and neurons padded
with zeros, a neuron's up row and down column side by side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import torch

from sparse_kernels import _abi
from sparse_kernels.arena import Arena, aligned
from sparse_kernels.native import new_struct
from sparse_kernels.weights import DecoderConfig, EndTensors, LayerShape, LayerTensors


class NonFiniteWeights(ValueError):
    """A weight is NaN or infinite; the message names the tensor."""


@dataclass(frozen=True, slots=True)
class PackedDecoder:
    """What sk_model_create is told of the weights. The pointers hold as long as `arena` lives."""

    config: DecoderConfig
    arena: Arena
    rope_frequencies: torch.Tensor  # [rows, head_dim / 2]
    layers: ctypes.Array[_abi.sk_layer]
    norm: torch.Tensor
    embedding: _abi.sk_matrix
    lm_head: _abi.sk_matrix


def pack(config: DecoderConfig, ends: EndTensors, layers: Iterable[LayerTensors]) -> PackedDecoder:
    """Copy all weights into an arena of their own.

    Layers are taken one at a time and none is kept, so that an iterator that reads them needs memory
    for one. Raises NonFiniteWeights, ValueError where a tensor has another shape or dtype than `config`
    asks for, MemoryError.
    """
    vocab = (config.vocab_size, config.hidden_size)
    frequencies = config.rope_frequencies.view(-1, config.head_dim // 2)
    tables = _matrix_bytes(*vocab) * (1 if ends.lm_head is None else 2)
    vectors = _vector_bytes(config.hidden_size) + _vector_bytes(frequencies.numel())
    arena = Arena(tables + vectors + sum(_layer_bytes(config, s) for s in config.layers))
    frequencies = _vector(arena, frequencies.numel()).view_as(frequencies).copy_(frequencies)
    embedding = _fill_matrix(arena, "embedding", ends.embedding, *vocab)
    lm_head = embedding
    if ends.lm_head is not None:
        lm_head = _fill_matrix(arena, "lm_head", ends.lm_head, *vocab)
    norm = _vector(arena, config.hidden_size)
    norm.copy_(_checked("norm", ends.norm, (config.hidden_size,)))
    structs = (_abi.sk_layer * len(config.layers))()
    source = iter(layers)
    for index, shape in enumerate(
        config.layers
    ):  # zip would hold a layer while it asks for another
        structs[index] = _pack_layer(arena, config, shape, next(source), f"layer {index}: ")
    return PackedDecoder(config, arena, frequencies, structs, norm, embedding, lm_head)


def pointer(tensor: torch.Tensor) -> ctypes._Pointer[ctypes.c_float]:
    """To a float32 tensor's first number, for a field of a struct; does not keep it alive."""
    return ctypes.cast(tensor.data_ptr(), ctypes.POINTER(ctypes.c_float))


def row_stride(columns: int) -> int:
    """Bytes from a row to the next.

    A dot product reads a tile of rows side by side. The L1 cache picks a line's place by the low 12
    bits of its address, so rows a multiple of 2048 bytes apart would all compete for two of its 64 sets;
    one line more in each row spreads them.
    """
    stride = 2 * aligned(columns, _abi.SK_COLUMN_TILE)
    return stride if stride % 2048 else stride + _abi.SK_ALIGNMENT


def _matrix_bytes(rows: int, columns: int) -> int:
    return aligned(rows, _abi.SK_ROW_TILE) * row_stride(columns)


def _vector_bytes(length: int) -> int:
    return aligned(4 * length)


def _matrices(config: DecoderConfig, shape: LayerShape) -> dict[str, tuple[int, int]]:
    """sk_layer field -> rows, columns."""
    neurons = aligned(shape.intermediate_size, _abi.SK_NEURON_BLOCK)
    return {
        "qkv": (_padded_heads(config, shape), config.hidden_size),
        "output": (config.hidden_size, shape.num_heads * config.head_dim),
        "gate": (neurons, config.hidden_size),
        "up_down": (neurons, 2 * aligned(config.hidden_size, _abi.SK_COLUMN_TILE)),
    }


def _padded_heads(config: DecoderConfig, shape: LayerShape) -> int:
    """Rows of the packed q, k and v."""
    heads = shape.num_heads + 2 * shape.num_kv_heads
    return heads * aligned(config.head_dim, _abi.SK_ROW_TILE)


def _layer_bytes(config: DecoderConfig, shape: LayerShape) -> int:
    """With room for all the vectors that a layer may have."""
    lengths = [*3 * [config.hidden_size], _padded_heads(config, shape), *2 * [config.head_dim]]
    matrices = sum(_matrix_bytes(*size) for size in _matrices(config, shape).values())
    return matrices + sum(map(_vector_bytes, lengths))


def _pack_layer(
    arena: Arena, config: DecoderConfig, shape: LayerShape, tensors: LayerTensors, where: str
) -> _abi.sk_layer:
    _check_layer(config, shape, tensors, where)
    hidden, head_dim, neurons = config.hidden_size, config.head_dim, shape.intermediate_size
    matrices = _matrices(config, shape)
    layer = new_struct(_abi.sk_layer)
    layer.num_heads, layer.num_kv_heads = shape.num_heads, shape.num_kv_heads
    layer.intermediate_size, layer.window = neurons, shape.window
    layer.qkv, qkv = _matrix(arena, *matrices["qkv"])
    heads = qkv.view(-1, aligned(head_dim, _abi.SK_ROW_TILE), qkv.shape[1])
    for place, weight in _heads(shape, tensors.q, tensors.k, tensors.v):
        heads[place, :head_dim, :hidden] = weight.view(-1, head_dim, hidden)
    layer.output, output = _matrix(arena, *matrices["output"])
    output[:hidden, : tensors.output.shape[1]] = tensors.output
    layer.gate, gate = _matrix(arena, *matrices["gate"])
    gate[:neurons, :hidden] = tensors.gate
    # A neuron's up row and down column are side by side.
    both, up_down = _matrix(arena, *matrices["up_down"])
    half = matrices["up_down"][1] // 2
    up_down[:neurons, :hidden] = tensors.up
    up_down[:neurons, half : half + hidden] = tensors.down.T
    layer.up, layer.down = _part(both, 0, hidden), _part(both, half, hidden)
    if tensors.q_bias is not None and tensors.k_bias is not None and tensors.v_bias is not None:
        bias = _vector(arena, _padded_heads(config, shape))
        by_head = bias.view(-1, aligned(head_dim, _abi.SK_ROW_TILE))
        for place, part in _heads(shape, tensors.q_bias, tensors.k_bias, tensors.v_bias):
            by_head[place, :head_dim] = part.view(-1, head_dim)
        layer.qkv_bias = pointer(bias)
    for name in ("attention_norm", "mlp_norm", "output_bias", "q_norm", "k_norm"):
        if (values := getattr(tensors, name)) is not None:
            setattr(layer, name, pointer(_vector(arena, len(values)).copy_(values)))
    return layer


def _heads(
    shape: LayerShape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(which heads of the packed q | k | v, their tensor)."""
    first = 0
    for part, count in ((q, shape.num_heads), (k, shape.num_kv_heads), (v, shape.num_kv_heads)):
        yield slice(first, first + count), part
        first += count


def _matrix(arena: Arena, rows: int, columns: int) -> tuple[_abi.sk_matrix, torch.Tensor]:
    """A zeroed matrix, and its elements [rows in whole tiles, elements of a stride]."""
    size, stride = _matrix_bytes(rows, columns), row_stride(columns)
    elements = arena.take(size, torch.bfloat16).view(-1, stride // 2)
    matrix = new_struct(_abi.sk_matrix)
    matrix.rows, matrix.columns = rows, columns
    matrix.codes, matrix.low = new_struct(_abi.sk_plane), new_struct(_abi.sk_plane)
    matrix.codes.data, matrix.codes.bytes = elements.data_ptr(), size
    matrix.codes.row_stride, matrix.codes.bits = stride, 16
    return matrix, elements


def _part(matrix: _abi.sk_matrix, first: int, columns: int) -> _abi.sk_matrix:
    """The columns of a matrix from `first` on."""
    part = _abi.sk_matrix.from_buffer_copy(matrix)
    part.columns = columns
    part.codes.data += 2 * first
    part.codes.bytes -= 2 * first
    return part


def _fill_matrix(
    arena: Arena, name: str, tensor: torch.Tensor, rows: int, columns: int
) -> _abi.sk_matrix:
    matrix, elements = _matrix(arena, rows, columns)
    elements[:rows, :columns] = _checked(name, tensor, (rows, columns))
    return matrix


def _vector(arena: Arena, length: int) -> torch.Tensor:
    """[length] float32."""
    return arena.take(4 * length, torch.float32)


def _check_layer(
    config: DecoderConfig, shape: LayerShape, tensors: LayerTensors, where: str
) -> None:
    """Raises ValueError or NonFiniteWeights. Assignments would broadcast what is too small."""
    hidden, neurons = config.hidden_size, shape.intermediate_size
    q, kv = shape.num_heads * config.head_dim, shape.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "output": (hidden, q),
        "gate": (neurons, hidden), "up": (neurons, hidden), "down": (hidden, neurons),
        "attention_norm": (hidden,), "mlp_norm": (hidden,),
        "q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,), "output_bias": (hidden,),
        "q_norm": (config.head_dim,), "k_norm": (config.head_dim,),
    }  # fmt: skip
    for field in fields(tensors):
        if (tensor := getattr(tensors, field.name)) is not None:
            _checked(where + field.name, tensor, shapes[field.name])
    missing = [bias is None for bias in (tensors.q_bias, tensors.k_bias, tensors.v_bias)]
    if any(missing) and not all(missing):
        raise ValueError(f"{where}of q_bias, k_bias and v_bias some are missing; give all or none")


def _checked(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    dtype = torch.float32 if len(shape) == 1 else torch.bfloat16
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}"
        )
    if not bool(tensor.isfinite().all()):
        raise NonFiniteWeights(f"{name} holds values that are not finite")
    return tensor
