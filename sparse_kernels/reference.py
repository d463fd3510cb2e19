"""What the kernels mean, in plain torch and float64: the oracle of their tests.

Only the KV cache is rounded as it is stored: to bfloat16, or to 8 bits. Integer matrices are the numbers
that they stand for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from sparse_kernels import _abi
from sparse_kernels.arena import aligned
from sparse_kernels.choice import ALL_NEURONS, ChoiceKind, NeuronChoice
from sparse_kernels.formats import DecoderFormats, LayerFormats
from sparse_kernels.weights import (
    FACTOR_ZERO,
    ChoiceTensors,
    DecoderConfig,
    EndTensors,
    Factors,
    LayerShape,
    LayerTensors,
    Matrix,
    QuantizedMatrix,
)

# Of each layer: keys, values [positions, num_kv_heads, head_dim] float32, rounded.
Cache = list[tuple[torch.Tensor, torch.Tensor]]


def empty_cache(config: DecoderConfig) -> Cache:
    shapes = [(0, layer.num_kv_heads, config.head_dim) for layer in config.layers]
    return [(torch.zeros(s), torch.zeros(s)) for s in shapes]


def forward(
    config: DecoderConfig,
    ends: EndTensors,
    layers: list[LayerTensors],
    token_ids: list[int],
    cache: Cache,
    kv_bits: int = 16,
    choice: NeuronChoice = ALL_NEURONS,
    tensors: ChoiceTensors = ChoiceTensors(),
    formats: DecoderFormats = DecoderFormats(),
    reads: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Tokens that follow those of `cache`, which grows by them.

    -> the hidden states [tokens, hidden] before the last norm, and of each layer the norm scores
    [tokens, intermediate]. All tokens choose neurons by `choice`, in planes as `formats` says; what they
    read is added to `reads` [layers, 4].
    """
    x, scores = ends.embedding[token_ids].double(), []
    for index, (shape, layer) in enumerate(zip(config.layers, layers, strict=True)):
        plan = formats.layer(index)
        q, k, v = project_heads(config, layer, x, start=len(cache[index][0]))
        keys, values = cache[index]
        cache[index] = (
            torch.cat((keys, stored(k, kv_bits))),
            torch.cat((values, stored(v, kv_bits))),
        )
        out = attention(q, *cache[index], shape.window)
        out = out @ exact(layer.output).T + low_rank(layer.output, layer.output_basis, out)
        x = x + (out if layer.output_bias is None else out + layer.output_bias.double())
        normed = rms_norm(x, layer.mlp_norm, config.rms_norm_eps)
        chosen = choose(layer, index, normed, choice, tensors, plan)
        if reads is not None:
            kinds = (chosen.looked, chosen.used, chosen.whole, chosen.down_whole)
            reads[index] += torch.stack([mask.sum() for mask in kinds])
        activations = chosen.activations
        low_bits = plan.down.low_bits
        x = x + down(layer.down, activations, chosen.down_whole, low_bits, layer.down_basis)
        if layer.down_bias is not None:
            x = x + layer.down_bias.double()
        if choice.correction:
            inputs, outputs = tensors.corrections[choice.correction - 1][index]
            x = x + (normed @ inputs.double().T) @ outputs.double()
        scores.append(activations.square() / activations.square().sum(1, keepdim=True))
    return x, scores


@dataclass(frozen=True, slots=True)
class Chosen:
    """What tokens make of a layer's neurons, [tokens, intermediate] each; see sk_choice."""

    looked: torch.Tensor
    used: torch.Tensor
    whole: torch.Tensor
    down_whole: torch.Tensor
    activations: torch.Tensor  # float64, zero where not used


def choose(
    layer: LayerTensors,
    index: int,
    normed: torch.Tensor,
    choice: NeuronChoice,
    tensors: ChoiceTensors,
    formats: LayerFormats,
) -> Chosen:
    """normed [tokens, hidden] float64, the inputs of gate and up of the layer with this index."""
    basis = layer.gate_up_basis
    gate, up = (
        normed @ exact(matrix).T + low_rank(matrix, basis, normed)
        for matrix in (layer.gate, layer.up)
    )
    neurons = gate.shape[1]
    core = choice.members(neurons)
    looked = (
        torch.ones_like(gate, dtype=torch.bool) if core is None else core[index].expand_as(gate)
    )
    if choice.kind is None:
        return Chosen(looked, looked, looked, looked, F.silu(gate) * up * looked)
    assert choice.thresholds is not None
    use, complete, complete_down = choice.thresholds[index].double()
    if choice.kind is ChoiceKind.GATE:
        assert tensors.gate_factors is not None
        used = looked & (F.silu(gate).abs() * tensors.gate_factors[index, :neurons] >= use)
        return Chosen(looked, used, used, used, F.silu(gate) * up * used)
    assert tensors.planes_factors is not None
    factors = tensors.planes_factors[index, :neurons].double()
    gate_high, gate_variance = upper(layer.gate, normed, formats.gate_up.low_bits, basis)
    up_high, up_variance = upper(layer.up, normed, formats.gate_up.low_bits, basis)
    approximate = F.silu(gate_high) * up_high
    importance = approximate.abs() * factors
    sigmoid = gate_high.sigmoid()
    slope = sigmoid * (1 + gate_high * (1 - sigmoid))
    noise = (
        factors
        * (
            (slope * up_high).square() * gate_variance
            + F.silu(gate_high).square() * up_variance
            + slope.square() * gate_variance * up_variance
        ).sqrt()
    )
    used = looked & (importance >= use)
    whole = used & (noise >= complete)
    down_whole = used & (importance >= complete_down)
    if not formats.down.low_bits:
        down_whole = used
    activations = torch.where(whole, F.silu(gate) * up, approximate) * used
    return Chosen(looked, used, whole, down_whole, activations)


def low_rank(matrix: Matrix, basis: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """x [tokens, columns] -> its low-rank term B (A x), [tokens, rows]; zeros where there is none."""
    if basis is None:
        return torch.zeros(1, dtype=torch.float64)
    assert isinstance(matrix, QuantizedMatrix)
    assert matrix.factors is not None
    return (x @ basis.double().T) @ matrix.factors.dequantize().double().T


def upper_factors(factors: Factors, bits: int, unit: int, middle: float) -> torch.Tensor:
    """float64 [rows, rank]: of each code of `bits`, two of which make a factor of 8 if they are 4, the
    multiples of `unit` alone, `middle` added."""
    numbers = torch.zeros(factors.codes.shape, dtype=torch.float64)
    for shift in range(0, 8, bits):
        code = factors.codes.long() >> shift & ((1 << bits) - 1)
        numbers += (code // unit * unit + middle) * (1 << shift)
    return factors.scales.double()[:, None] * (numbers - FACTOR_ZERO)


def upper(
    matrix: Matrix, normed: torch.Tensor, low_bits: int, basis: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """normed [tokens, hidden] -> its product with the upper bits, the mean of the lower ones added, and the
    variance of what these make of it; [tokens, rows] each."""
    assert isinstance(matrix, QuantizedMatrix)
    unit, columns = 1 << low_bits, matrix.codes.shape[1]
    high = replace(matrix, codes=matrix.codes // unit * unit).dequantize().double()
    scales = matrix.scales.double()
    by_column = scales.repeat_interleave(matrix.group_size, dim=1)[:, :columns]
    product = normed @ (high + by_column * (unit - 1) / 2).T
    squares = normed.square() @ by_column.square().T
    if basis is not None:
        assert matrix.factors is not None
        inputs = normed @ basis.double().T
        parts = upper_factors(matrix.factors, matrix.bits, unit, (unit - 1) / 2)
        product += inputs @ parts.T
        weight = 1 if matrix.bits == 8 else 16**2 + 1  # of the halves of a code
        row_scales = matrix.factors.scales.double()
        squares += weight * inputs.square().sum(dim=1, keepdim=True) * row_scales.square()
    return product, squares * (unit**2 - 1) / 12


def down(
    matrix: Matrix,
    activations: torch.Tensor,
    whole: torch.Tensor,
    low_bits: int,
    basis: torch.Tensor | None,
) -> torch.Tensor:
    """activations [tokens, intermediate] -> [tokens, hidden]; of neurons that are not `whole` only the upper
    bits count, with half of the lower ones' range."""
    if not isinstance(matrix, QuantizedMatrix):
        return activations @ exact(matrix).T
    unit = 1 << low_bits
    high = replace(matrix, codes=matrix.codes // unit * unit + unit // 2)
    completely = activations * whole if low_bits else activations
    approximately = activations - completely
    out = completely @ exact(matrix) + approximately @ exact(high)
    if basis is None:
        return out
    assert matrix.factors is not None
    parts = upper_factors(matrix.factors, matrix.bits, unit, unit // 2)
    z = completely @ matrix.factors.dequantize().double() + approximately @ parts
    return out + z @ basis.double()


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
        out = out + low_rank(weight, layer.qkv_basis, normed)
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


def stored(x: torch.Tensor, kv_bits: int) -> torch.Tensor:
    """x [..., head_dim], each last dimension of which is one token's, rounded as the cache keeps it."""
    if kv_bits == 16:
        return x.bfloat16().float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127).bfloat16().float()
    return (x / scale.clamp(min=1e-30)).round().float() * scale


def block_of(
    shape: LayerShape, head_dim: int, kv_bits: int, block: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's KV block, flat uint8, -> keys, values [SK_BLOCK_SIZE, num_kv_heads, head_dim].

    Of each head first the keys, [tuples of dimensions][positions][tuple], then the values, [tuples of
    positions][dimensions][tuple]; dimensions are padded to whole tiles. With 16 bits a tuple is two
    bfloat16 numbers. With 8 it is four bytes, number + 128, and 16 bfloat16 scales of the keys and 16 of
    the values follow: number * scale is the element.
    """
    dim, size = aligned(head_dim, _abi.SK_ROW_TILE), _abi.SK_BLOCK_SIZE
    tuple_size = 32 // kv_bits
    heads = block.view(shape.num_kv_heads, -1)
    numbers = heads[:, : 2 * size * dim * kv_bits // 8].contiguous()
    if kv_bits == 16:
        numbers = numbers.view(torch.bfloat16)
    keys, values = numbers.view(-1, 2, size * dim).unbind(1)
    keys = keys.reshape(-1, dim // tuple_size, size, tuple_size).permute(2, 0, 1, 3).flatten(2)
    values = values.reshape(-1, size // tuple_size, dim, tuple_size)
    values = values.permute(1, 3, 0, 2).flatten(0, 1)
    keys, values = keys[..., :head_dim].float(), values[..., :head_dim].float()
    if kv_bits == 16:
        return keys, values
    scales = heads[:, 2 * size * dim :].contiguous().view(torch.bfloat16).float()
    key_scales, value_scales = scales.view(-1, 2, size).permute(1, 2, 0).unsqueeze(-1)
    return (keys - 128) * key_scales, (values - 128) * value_scales
