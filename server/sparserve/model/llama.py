"""The Llama family as plain functions of tensors and weights; knows no batches, blocks or requests."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from sparserve.model.rope import RopeConfig
from sparserve.model.weights import LayerWeights

# linear(x [rows, in], weight [out, in]) -> [rows, out] float32
Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n] float32, weight [n]; each row by itself. arXiv 1910.07467."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rope_frequencies(
    rope: RopeConfig, head_dim: int, factors: torch.Tensor | None = None, positions: int = 2**31
) -> torch.Tensor:
    """Inverse frequencies [head_dim / 2] in radians per position (arXiv 2104.09864).

    `factors` divide them; that is how GGUF files carry the llama3 scaling. As in llama.cpp, linear
    scaling comes on top. Of the "dynamic" kind: [positions, head_dim / 2] for at most `positions` of
    the context, where those of the last position hold for all beyond.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if factors is not None:
        frequencies = frequencies / factors
    match rope.kind:
        case "linear":
            return frequencies / rope.factor
        case "dynamic":
            return _dynamic_frequencies(rope, frequencies, positions)
        case "llama3":
            return _llama3_frequencies(rope, frequencies)
        case "yarn":
            return _yarn_frequencies(rope, frequencies)
    return frequencies


def _dynamic_frequencies(
    rope: RopeConfig, frequencies: torch.Tensor, positions: int
) -> torch.Tensor:
    """NTK-aware scaling as it is at the moment when a position is the sequence's last.

    transformers `_compute_dynamic_ntk_parameters` takes the length seen so far for all tokens of a
    forward. Here each position has the frequencies of the length that ends with it, as in a
    transformers run that decodes token by token, however a prompt is cut.
    """
    original, head_dim = rope.original_max_position_embeddings, 2 * len(frequencies)
    positions = min(positions, rope.context(original))
    if positions <= original:
        return frequencies.expand(positions, -1)
    lengths = torch.arange(original + 1, positions + 1, dtype=torch.float64)
    grown = (rope.factor * lengths / original - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    beyond = 1.0 / ((rope.theta * grown)[:, None] ** exponents)
    return torch.cat((frequencies.expand(original, -1), beyond.float()))


def _yarn_frequencies(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Few rotations in the original context: divided by `factor`; many: kept; a ramp between
    (arXiv 2309.00071, section 3.2; transformers `_compute_yarn_parameters`)."""
    pairs = len(frequencies)

    def pair_of(rotations: float) -> float:
        wavelength = rope.original_max_position_embeddings / rotations
        return pairs * math.log(wavelength / (2 * math.pi)) / math.log(rope.theta)

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    width = high - low if high != low else 0.001
    divided = ((torch.arange(pairs).float() - low) / width).clamp(0, 1)
    return frequencies / rope.factor * divided + frequencies * (1 - divided)


def _llama3_frequencies(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    original = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    scaled = torch.where(
        wavelengths > original / rope.low_freq_factor, frequencies / rope.factor, between
    )
    return torch.where(wavelengths < original / rope.high_freq_factor, frequencies, scaled)


def rope_tables(
    positions: torch.Tensor, frequencies: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """positions [rows], frequencies of `rope_frequencies` -> cos, sin [rows, 1, head_dim / 2], times
    `scale` (yarn's attention factor)."""
    if frequencies.dim() == 2:
        frequencies = frequencies[positions.clamp(max=len(frequencies) - 1)]
    angles = (positions.float()[:, None] * frequencies)[:, None, :]
    return angles.cos() * scale, angles.sin() * scale


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [rows, heads, head_dim]; the halves of a head are the pairs, as in Hugging Face's layout."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def project_heads(
    linear: Linear,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    eps: float,
    head_dim: int,
) -> torch.Tensor:
    """x [rows, hidden] -> heads of q, k or v [rows, heads, head_dim], before RoPE.

    `bias` [heads * head_dim] is added, `norm` [head_dim] weighs an RMSNorm of each head.
    """
    out = linear(x, weight)
    if bias is not None:
        out = out + bias
    heads = out.view(len(x), -1, head_dim)
    return heads if norm is None else rms_norm(heads, norm, eps)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Grouped-query attention in float32.

    q [rows, num_heads, head_dim], k and v [num_kv_heads, context, head_dim], mask [rows, context]
    with 0 or -inf (None: all visible) -> [rows, num_heads * head_dim].
    """
    rows, heads, head_dim = q.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    grouped = q.view(rows, kv_heads, group, head_dim).permute(1, 2, 0, 3)  # [kv, group, rows, dim]
    scores = grouped.reshape(kv_heads, group * rows, head_dim) @ k.transpose(1, 2)
    scores = (scores * head_dim**-0.5).view(kv_heads, group, rows, -1)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1).view(kv_heads, group * rows, -1)
    out: torch.Tensor = (weights @ v).view(kv_heads, group, rows, head_dim)
    return out.permute(2, 0, 1, 3).reshape(rows, heads * head_dim)


def gate_and_up(
    linear: Linear, x: torch.Tensor, layer: LayerWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) and up, whose product is SwiGLU's inner activation: x [rows, hidden] -> [rows, intermediate]."""
    return F.silu(linear(x, layer.w_gate)), linear(x, layer.w_up)
