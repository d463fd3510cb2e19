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


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """One layer; matrices are bfloat16 [out, in], vectors float32, None where there is none."""

    q: torch.Tensor  # [num_heads * head_dim, hidden]
    k: torch.Tensor  # [num_kv_heads * head_dim, hidden]
    v: torch.Tensor  # [num_kv_heads * head_dim, hidden]
    output: torch.Tensor  # [hidden, num_heads * head_dim]
    gate: torch.Tensor  # [intermediate, hidden]
    up: torch.Tensor  # [intermediate, hidden]
    down: torch.Tensor  # [hidden, intermediate]
    attention_norm: torch.Tensor  # [hidden]
    mlp_norm: torch.Tensor  # [hidden]
    q_bias: torch.Tensor | None = None  # [num_heads * head_dim]; of q, k and v all or none
    k_bias: torch.Tensor | None = None  # [num_kv_heads * head_dim]
    v_bias: torch.Tensor | None = None  # [num_kv_heads * head_dim]
    output_bias: torch.Tensor | None = None  # [hidden]
    q_norm: torch.Tensor | None = None  # [head_dim]
    k_norm: torch.Tensor | None = None  # [head_dim]


@dataclass(frozen=True, slots=True)
class EndTensors:
    """What stands before the first layer and after the last."""

    embedding: torch.Tensor  # bfloat16 [vocab, hidden]
    norm: torch.Tensor  # float32 [hidden]
    lm_head: torch.Tensor | None = None  # bfloat16 [vocab, hidden]; None: the embedding
