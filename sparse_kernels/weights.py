"""A decoder as the kernels see it: its constants, and its weights as plain tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Layers of one model may differ in all of these."""

    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    window: int = 0  # positions that attention sees, its own included; 0: all


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shapes and constants."""

    hidden_size: int
    vocab_size: int
    head_dim: int
    rms_norm_eps: float
    # [head_dim / 2] float32, radians per position; or [rows, head_dim / 2]: row p is for position p,
    # the last one for all beyond.
    rope_frequencies: torch.Tensor
    layers: Sequence[LayerShape]
    rope_scale: float = 1.0  # of cos and sin: yarn's attention factor


class NonFiniteWeights(ValueError):
    """A weight is NaN or infinite; the message names the tensor."""


FACTOR_ZERO = 136  # both halves of a code minus 8: 16 (upper - 8) + lower - 8 = code - 136


@dataclass(frozen=True, slots=True)
class Factors:
    """B of a low-rank term, B (A x): scale * (code - FACTOR_ZERO). Its basis A is the layer's.

    An activation becomes an integer times each scale of its row of a down projection, by the largest of
    them: A should be scaled so that these scales are about those of the matrix, or one of both is rough.
    """

    codes: torch.Tensor  # uint8 [rows, rank]
    scales: torch.Tensor  # float16 [rows], finite and >= 0

    def dequantize(self) -> torch.Tensor:
        """float32 [rows, rank], exact."""
        return self.scales.float()[:, None] * (self.codes.float() - FACTOR_ZERO)


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """Integers with a scale and a zero for each group of columns of a row; the last group has the rest."""

    codes: torch.Tensor  # uint8 [rows, columns], below 2^bits
    scales: torch.Tensor  # float16 [rows, groups]; 0 for a group of zeros
    zeros: torch.Tensor  # uint8 [rows, groups], below 2^bits
    bits: int
    group_size: int
    factors: Factors | None = None  # of a low-rank term

    def dequantize(self) -> torch.Tensor:
        """scale * (code - zero), float32 [rows, columns], without a low-rank term; exact: 11 bits times 9."""
        columns = self.codes.shape[1]
        scales, zeros = (
            t.float().repeat_interleave(self.group_size, dim=1)[:, :columns]
            for t in (self.scales, self.zeros)
        )
        return scales * (self.codes.float() - zeros)


Matrix = torch.Tensor | QuantizedMatrix


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """One layer; matrices are [out, in] in bfloat16 or quantized, vectors float32, None where there is
    none. A quantized `down` is [in, out]: its groups run within a neuron's column.

    A basis is the A of low-rank terms, bfloat16: y = W x + B (A x), and of down y = W x + A^T (B^T x), with
    the factors B [rows of W as it is stored, rank] of each matrix.
    """

    q: Matrix  # [num_heads * head_dim, hidden]
    k: Matrix  # [num_kv_heads * head_dim, hidden]
    v: Matrix  # [num_kv_heads * head_dim, hidden]
    output: Matrix  # [hidden, num_heads * head_dim]
    gate: Matrix  # [intermediate, hidden]
    up: Matrix  # [intermediate, hidden]
    down: Matrix  # [hidden, intermediate], or [intermediate, hidden] quantized
    attention_norm: torch.Tensor  # [hidden]
    mlp_norm: torch.Tensor  # [hidden]
    q_bias: torch.Tensor | None = None  # [num_heads * head_dim]; of q, k and v all or none
    k_bias: torch.Tensor | None = None  # [num_kv_heads * head_dim]
    v_bias: torch.Tensor | None = None  # [num_kv_heads * head_dim]
    output_bias: torch.Tensor | None = None  # [hidden]
    down_bias: torch.Tensor | None = None  # [hidden]
    q_norm: torch.Tensor | None = None  # [head_dim]
    k_norm: torch.Tensor | None = None  # [head_dim]
    qkv_basis: torch.Tensor | None = None  # [rank, hidden], of q, k and v
    output_basis: torch.Tensor | None = None  # [rank, num_heads * head_dim]
    gate_up_basis: torch.Tensor | None = None  # [rank, hidden], of both
    down_basis: torch.Tensor | None = None  # [rank, hidden]


@dataclass(frozen=True, slots=True)
class ScanTensors:
    """A coarse copy of an LM head and how far off its products can be: `scan` of sk_model_args."""

    matrix: QuantizedMatrix  # [vocab, hidden in whole tiles of columns + directions]
    basis: torch.Tensor  # bfloat16 [directions, hidden]
    errors: torch.Tensor  # float32 [2, vocab]


# Of one layer: inputs, outputs, each bfloat16 [rank, hidden]; see sk_correction.
Correction = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class ChoiceTensors:
    """What a token's choice of neurons goes by, and what can stand in for those left out."""

    planes_factors: torch.Tensor | None = None  # float32 [layers, widest intermediate_size]
    gate_factors: torch.Tensor | None = None  # the same shape
    corrections: Sequence[Sequence[Correction]] = ()  # each has one for each layer


@dataclass(frozen=True, slots=True)
class EndTensors:
    """What stands before the first layer and after the last."""

    embedding: torch.Tensor  # bfloat16 [vocab, hidden]
    norm: torch.Tensor  # float32 [hidden]
    lm_head: Matrix | None = None  # [vocab, hidden]; None: the embedding
