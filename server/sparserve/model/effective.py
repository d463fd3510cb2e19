"""What quantized matrices with low-rank terms compute, as plain weights."""

from __future__ import annotations

import torch

from sparse_kernels.weights import LayerTensors, Matrix, QuantizedMatrix
from sparserve.model.weights import LayerWeights

# Elements of an LM head that are in float32 at once: their temporaries stay in caches.
BLOCK_ELEMENTS = 1 << 18


def effective(layer: LayerTensors, dtype: torch.dtype = torch.float32) -> LayerWeights:
    """What a layer computes: integers as they are rounded, with their low-rank terms. Matrices in `dtype`,
    vectors in float32."""

    def values(matrix: Matrix, basis: torch.Tensor | None) -> torch.Tensor:
        return effective_values(matrix, basis).to(dtype)

    down = values(layer.down, layer.down_basis)
    vectors = {
        name: None if own is None else own.float()
        for name, own in (
            ("bq", layer.q_bias),
            ("bk", layer.k_bias),
            ("bv", layer.v_bias),
            ("bo", layer.output_bias),
            ("bd", layer.down_bias),
            ("q_norm", layer.q_norm),
            ("k_norm", layer.k_norm),
        )
    }
    return LayerWeights(
        layer.attention_norm.float(),
        values(layer.q, layer.qkv_basis),
        values(layer.k, layer.qkv_basis),
        values(layer.v, layer.qkv_basis),
        values(layer.output, layer.output_basis),
        layer.mlp_norm.float(),
        values(layer.gate, layer.gate_up_basis),
        values(layer.up, layer.gate_up_basis),
        down.T.contiguous() if isinstance(layer.down, QuantizedMatrix) else down,
        **vectors,
    )


def effective_head(matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """An LM head [vocab, hidden] in `dtype`."""
    if not isinstance(matrix, QuantizedMatrix):
        return matrix.to(dtype)
    vocab, hidden = matrix.codes.shape
    out, step = torch.empty(vocab, hidden, dtype=dtype), max(1, BLOCK_ELEMENTS // hidden)
    for begin in range(0, vocab, step):
        rows = slice(begin, begin + step)
        parts = (matrix.codes[rows], matrix.scales[rows], matrix.zeros[rows])
        out[rows] = QuantizedMatrix(*parts, matrix.bits, matrix.group_size).dequantize()
    return out


def effective_values(matrix: Matrix, basis: torch.Tensor | None) -> torch.Tensor:
    """Of a matrix as it is stored, with B A where it has a low-rank term; float32."""
    if not isinstance(matrix, QuantizedMatrix):
        return matrix.float()
    values = matrix.dequantize()
    if matrix.factors is not None and basis is not None:
        values.addmm_(matrix.factors.dequantize(), basis.float())
    return values
