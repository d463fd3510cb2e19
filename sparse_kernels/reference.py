"""What the kernels mean, in plain torch and float64: the oracle of their tests.

Only the KV cache is rounded to bfloat16, as it is stored. Integer matrices are the numbers that they
stand for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparse_kernels import _abi
from sparse_kernels.arena import aligned
from sparse_kernels.weights import (
    DecoderConfig,
    EndTensors,
    LayerShape,
    LayerTensors,
    Matrix,
    QuantizedMatrix,
)

# Of each layer: keys, values [positions, num_kv_heads, head_dim] bfloat16.
Cache = list[tuple[torch.Tensor, torch.Tensor]]


def empty_cache(config: DecoderConfig) -> Cache:
    shapes = [(0, layer.num_kv_heads, config.head_dim) for layer in config.layers]
    return [(torch.zeros(s).bfloat16(), torch.zeros(s).bfloat16()) for s in shapes]


def forward(
    config: DecoderConfig,
    ends: EndTensors,
    layers: list[LayerTensors],
    token_ids: list[int],
    cache: Cache,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Tokens that follow those of `cache`, which grows by them.

    -> the hidden states [tokens, hidden] before the last norm, and of each layer the norm scores
    [tokens, intermediate].
    """
    x, scores = ends.embedding[token_ids].double(), []
    for index, (shape, layer) in enumerate(zip(config.layers, layers, strict=True)):
        q, k, v = project_heads(config, layer, x, start=len(cache[index][0]))
        keys, values = cache[index]
        cache[index] = torch.cat((keys, k.bfloat16())), torch.cat((values, v.bfloat16()))
        out = attention(q, *cache[index], shape.window) @ exact(layer.output).T
        x = x + (out if layer.output_bias is None else out + layer.output_bias.double())
        normed = rms_norm(x, layer.mlp_norm, config.rms_norm_eps)
        activations = F.silu(normed @ exact(layer.gate).T) * (normed @ exact(layer.up).T)
        columns = exact(layer.down)  # quantized they are rows already
        x = x + activations @ (columns if isinstance(layer.down, QuantizedMatrix) else columns.T)
        scores.append(activations.square() / activations.square().sum(1, keepdim=True))
    return x, scores


def logits(config: DecoderConfig, ends: EndTensors, hidden: torch.Tensor) -> torch.Tensor:
    """[rows, hidden] -> [rows, vocab]."""
    head = ends.embedding if ends.lm_head is None else ends.lm_head
    return rms_norm(hidden.double(), ends.norm, config.rms_norm_eps) @ exact(head).T


def exact(matrix: Matrix) -> torch.Tensor:
    """The numbers that a matrix stands for, float64."""
    if isinstance(matrix, QuantizedMatrix):
        return matrix.dequantize().double()
    return matrix.double()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight.double(), eps)


def project_heads(
    config: DecoderConfig, layer: LayerTensors, x: torch.Tensor, start: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [tokens, hidden] at positions from `start` on -> q, k, v [tokens, heads, head_dim]."""
    normed, heads = rms_norm(x, layer.attention_norm, config.rms_norm_eps), []
    for weight, bias, norm in (
        (layer.q, layer.q_bias, layer.q_norm),
        (layer.k, layer.k_bias, layer.k_norm),
        (layer.v, layer.v_bias, None),
    ):
        out = F.linear(normed, exact(weight), None if bias is None else bias.double())
        out = out.view(len(x), -1, config.head_dim)
        heads.append(out if norm is None else rms_norm(out, norm, config.rms_norm_eps))
    q, k, v = heads
    return rotate(config, q, start), rotate(config, k, start), v


def rotate(config: DecoderConfig, x: torch.Tensor, start: int) -> torch.Tensor:
    """RoPE of x [tokens, heads, head_dim]; the halves of a head are the pairs."""
    positions = torch.arange(start, start + len(x))
    frequencies = config.rope_frequencies.view(-1, config.head_dim // 2)
    frequencies = frequencies[positions.clamp(max=len(frequencies) - 1)]
    # The product is one of float32, here as in transformers: at position 1000 it is 3e-5 off.
    angles = (positions.float()[:, None] * frequencies).double()[:, None, :]
    cos, sin = angles.cos() * config.rope_scale, angles.sin() * config.rope_scale
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int
) -> torch.Tensor:
    """q [tokens, heads, dim], the last tokens of keys and values [positions, KV heads, dim]
    -> [tokens, heads * dim]. Each sees the positions up to its own, `window` of them unless 0."""
    positions = torch.arange(len(keys))
    own = positions[len(keys) - len(q) :, None]
    seen = positions <= own
    if window:
        seen &= positions > own - window
    group = q.shape[1] // keys.shape[1]
    k, v = (t.double().repeat_interleave(group, dim=1) for t in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def block_of(shape: LayerShape, head_dim: int, block: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A layer's KV block, flat bfloat16, -> keys, values [SK_BLOCK_SIZE, num_kv_heads, head_dim].

    Of each head first the keys, [pairs of dimensions][positions][2], then the values, [pairs of
    positions][dimensions][2]; its dimensions are padded to whole tiles.
    """
    dim, size = aligned(head_dim, _abi.SK_ROW_TILE), _abi.SK_BLOCK_SIZE
    keys, values = block.view(shape.num_kv_heads, 2, size * dim).unbind(1)
    keys = keys.reshape(-1, dim // 2, size, 2).permute(2, 0, 1, 3).flatten(2)
    values = values.reshape(-1, size // 2, dim, 2).permute(1, 3, 0, 2).flatten(0, 1)
    return keys[..., :head_dim], values[..., :head_dim]
