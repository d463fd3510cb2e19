"""A model's layers one after another in plain torch, as they are served: only one is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparse_kernels.formats import DecoderFormats
from sparse_kernels.weights import Matrix, QuantizedMatrix
from sparserve.compression.quantize import quantize_layer
from sparserve.model import llama
from sparserve.model.cpu import layer_tensors
from sparserve.model.loader import LoadedModel
from sparserve.model.weights import LayerWeights


@dataclass(frozen=True, slots=True)
class UpperPlane:
    """What the upper bits of a matrix say of it; the mean of all lower ones is added."""

    values: torch.Tensor  # float32 [neurons, hidden]
    # float32 [neurons, groups]: variance of an element, its lower bits being anything.
    variances: torch.Tensor
    group_size: int

    def products(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [tokens, hidden] -> (products, their variances), [tokens, neurons] each."""
        padded = F.pad(x.square(), (0, -x.shape[1] % self.group_size))
        squares = padded.view(len(x), -1, self.group_size).sum(dim=2)
        return x @ self.values.T, squares @ self.variances.T


@dataclass(frozen=True, slots=True)
class FeedForward:
    """One layer's matrices, [neurons, hidden] in float32."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    upper: tuple[UpperPlane, UpperPlane] | None = None  # of gate and up, where they have planes

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden], after the norm -> [tokens, neurons]."""
        return F.silu(x @ self.gate.T) * (x @ self.up.T)


def walk(
    model: LoadedModel, formats: DecoderFormats, token_ids: torch.Tensor
) -> Iterator[tuple[FeedForward, torch.Tensor]]:
    """token_ids [windows, tokens] -> of each layer its feed-forward, and what goes into it, [windows, tokens,
    hidden]."""
    config, weights = model.config, model.weights
    frequencies = llama.rope_frequencies(
        config.rope, config.head_dim, weights.rope_factors, config.max_position_embeddings
    )
    positions = torch.arange(token_ids.shape[1])
    tables = llama.rope_tables(positions, frequencies, config.rope.attention_factor)
    x = weights.embedding[token_ids].float()
    for index in range(config.num_layers):
        layer, mlp = _as_served(weights.layers[index], formats)
        mask = _causal(len(positions), config.window(index))
        for own in x:
            own += _attention(model, layer, own, tables, mask)
        normed = llama.rms_norm(x, layer.mlp_norm, config.rms_norm_eps)
        yield mlp, normed
        for own, inputs in zip(x, normed, strict=True):
            own += mlp.activations(inputs) @ mlp.down


def _as_served(layer: LayerWeights, formats: DecoderFormats) -> tuple[LayerWeights, FeedForward]:
    """In float32, after rounding to `formats`."""
    made = quantize_layer(layer_tensors(layer), formats, "")
    q, k, v, output, gate, up, down = map(
        _values, (made.q, made.k, made.v, made.output, made.gate, made.up, made.down)
    )
    down = down if isinstance(made.down, QuantizedMatrix) else down.T.contiguous()
    planes = [_upper(matrix, formats.gate_up.low_bits) for matrix in (made.gate, made.up)]
    upper = None if planes[0] is None or planes[1] is None else (planes[0], planes[1])
    vectors = {
        name: None if (own := getattr(layer, name)) is None else own.float()
        for name in ("bq", "bk", "bv", "bo", "q_norm", "k_norm")
    }
    weights = LayerWeights(
        layer.attn_norm.float(), q, k, v, output, layer.mlp_norm.float(), gate, up, down, **vectors
    )
    return weights, FeedForward(gate, up, down, upper)


def _values(matrix: Matrix) -> torch.Tensor:
    return matrix.dequantize() if isinstance(matrix, QuantizedMatrix) else matrix.float()


def _upper(matrix: Matrix, low_bits: int) -> UpperPlane | None:
    if not isinstance(matrix, QuantizedMatrix) or not low_bits:
        return None
    columns, unit = matrix.codes.shape[1], 1 << low_bits
    scales, zeros = (
        own.float().repeat_interleave(matrix.group_size, dim=1)[:, :columns]
        for own in (matrix.scales, matrix.zeros)
    )
    codes = (matrix.codes >> low_bits << low_bits).float() + (unit - 1) / 2
    variances = matrix.scales.float().square() * (unit**2 - 1) / 12
    return UpperPlane(scales * (codes - zeros), variances, matrix.group_size)


def _attention(
    model: LoadedModel,
    layer: LayerWeights,
    x: torch.Tensor,
    tables: Sequence[torch.Tensor],
    mask: torch.Tensor,
) -> torch.Tensor:
    """x [tokens, hidden] -> that shape."""
    config = model.config
    eps, head_dim = config.rms_norm_eps, config.head_dim
    normed = llama.rms_norm(x, layer.attn_norm, eps)
    q, k, v = (
        llama.project_heads(F.linear, normed, weight, bias, norm, eps, head_dim)
        for weight, bias, norm in (
            (layer.wq, layer.bq, layer.q_norm),
            (layer.wk, layer.bk, layer.k_norm),
            (layer.wv, layer.bv, None),
        )
    )
    q, k = (llama.apply_rope(heads, *tables) for heads in (q, k))
    out = llama.attention(q, k.transpose(0, 1), v.transpose(0, 1), mask)
    return F.linear(out, layer.wo, layer.bo)


def _causal(tokens: int, window: int) -> torch.Tensor:
    """[tokens, tokens]: 0, or -inf for what a token does not see."""
    queries, keys = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    hidden = keys > queries
    if window:
        hidden |= keys <= queries - window
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
