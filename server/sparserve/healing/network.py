"""A model as a network that can be trained: frozen matrices with low-rank terms, gains of neurons, norms and
biases of down that learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sparse_kernels.weights import LayerTensors
from sparserve.compression.low_rank import LowRank
from sparserve.model import llama
from sparserve.model.config import ModelConfig
from sparserve.model.weights import ModelWeights

# Matrices are multiplied in it, forwards and backwards; sums of the residual stream are float32.
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True, eq=False)
class Neurons:
    """What those of a layer make, in DTYPE."""

    inputs: torch.Tensor  # [batch, tokens, hidden], after the norm
    gates: torch.Tensor  # silu(gate), [batch, tokens, neurons]
    activations: torch.Tensor  # the same shape


# (layer, what its neurons make) -> the activations that down gets.
Used = Callable[[int, Neurons], torch.Tensor]


def all_used(layer: int, made: Neurons) -> torch.Tensor:
    """Dense."""
    return made.activations


class HealedStack(nn.Module):
    """Matrices with the same inputs, as one: x W^T + (x A^T) B^T."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor, term: LowRank | None) -> None:
        """weight [out, in]; without a `term` nothing learns."""
        super().__init__()
        self.register_buffer("weight", weight.to(DTYPE).contiguous(), persistent=False)
        self.rank = 0 if term is None else len(term.inputs)
        if term is not None:
            self.inputs = nn.Parameter(term.inputs.clone())  # A
            self.outputs = nn.Parameter(term.outputs.clone())  # B

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out], both DTYPE"""
        y = F.linear(x, self.weight)
        if self.rank:
            y = y + F.linear(F.linear(x, self.inputs.to(DTYPE)), self.outputs.to(DTYPE))
        return y

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """[out, in] float32"""
        whole = self.weight.float()
        return whole.addmm(self.outputs, self.inputs) if self.rank else whole


class HealedLayer(nn.Module):
    qkv_bias: torch.Tensor | None
    output_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None

    def __init__(
        self, config: ModelConfig, index: int, layer: LayerTensors, stacks: dict[str, HealedStack]
    ) -> None:
        """`stacks`: qkv, output, gate_up, down."""
        super().__init__()
        self.index, self._config, self._window = index, config, config.window(index)
        size = config.layer(index)
        heads = [size.num_heads, size.num_kv_heads, size.num_kv_heads]
        self._rows = [own * config.head_dim for own in heads]
        self.qkv, self.output = stacks["qkv"], stacks["output"]
        self.gate_up, self.down = stacks["gate_up"], stacks["down"]
        self.attn_norm = nn.Parameter(layer.attention_norm.float().clone())
        self.mlp_norm = nn.Parameter(layer.mlp_norm.float().clone())
        self.log_gains = nn.Parameter(torch.zeros(size.intermediate_size))
        bias = layer.down_bias
        self.down_bias = nn.Parameter(
            torch.zeros(config.hidden_size) if bias is None else bias.float().clone()
        )
        biases = [
            own.float() for own in (layer.q_bias, layer.k_bias, layer.v_bias) if own is not None
        ]
        self.register_buffer("qkv_bias", torch.cat(biases) if biases else None, persistent=False)
        for name in ("output_bias", "q_norm", "k_norm"):
            own = getattr(layer, name)
            self.register_buffer(name, None if own is None else own.float(), persistent=False)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], used: Used
    ) -> torch.Tensor:
        """x [batch, tokens, hidden] float32; rope: tables of `llama.rope_tables`."""
        eps = self._config.rms_norm_eps
        x = x + self._attention(llama.rms_norm(x, self.attn_norm, eps), rope)
        normed = llama.rms_norm(x, self.mlp_norm, eps).to(DTYPE)
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        gates = F.silu(gate)
        neurons = Neurons(normed, gates, gates * up * self.log_gains.exp().to(DTYPE))
        made: torch.Tensor = self.down(used(self.index, neurons))
        return x + made.float() + self.down_bias

    def _attention(
        self, normed: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        batch, tokens, _ = normed.shape
        eps, head_dim = self._config.rms_norm_eps, self._config.head_dim
        products = self.qkv(normed.to(DTYPE)).float()
        if self.qkv_bias is not None:
            products = products + self.qkv_bias
        heads = [
            own.view(batch, tokens, -1, head_dim) for own in products.split(self._rows, dim=-1)
        ]
        for place, norm in enumerate((self.q_norm, self.k_norm)):
            if norm is not None:
                heads[place] = llama.rms_norm(heads[place], norm, eps)
            heads[place] = llama.apply_rope(heads[place], *rope)
        q, k, v = (own.to(DTYPE).transpose(1, 2) for own in heads)  # [batch, heads, tokens, dim]
        k, v = (own.repeat_interleave(q.shape[1] // own.shape[1], dim=1) for own in (k, v))
        seen = None
        if 0 < self._window < tokens:
            seen = _window_mask(tokens, self._window, q.device)
        mixed = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None)
        made: torch.Tensor = self.output(mixed.transpose(1, 2).reshape(batch, tokens, -1)).float()
        return made if self.output_bias is None else made + self.output_bias


class Network(nn.Module):
    """From tokens to the last hidden states."""

    embedding: torch.Tensor
    head: torch.Tensor
    frequencies: torch.Tensor

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, layers: list[HealedLayer]
    ) -> None:
        """`weights` for what stands before and after the `layers`."""
        super().__init__()
        self.config = config
        self.healed = tuple(layers)  # as they are in `layers`
        self.layers = nn.ModuleList(layers)
        self.norm = nn.Parameter(weights.norm.float().clone())
        self.register_buffer("embedding", weights.embedding.to(DTYPE), persistent=False)
        tied = weights.lm_head is weights.embedding
        head = self.embedding if tied else weights.lm_head.to(DTYPE)
        self.register_buffer("head", head, persistent=False)
        frequencies = llama.rope_frequencies(
            config.rope, config.head_dim, weights.rope_factors, config.max_position_embeddings
        )
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, token_ids: torch.Tensor, used: Used = all_used) -> torch.Tensor:
        """token_ids [batch, tokens] -> [batch, tokens, hidden] float32, after the last norm; `head` makes logits
        of it."""
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        rope = llama.rope_tables(positions, self.frequencies, self.config.rope.attention_factor)
        x = self.embedding[token_ids].float()
        for layer in self.layers:
            x = layer(x, rope, used)
        return llama.rms_norm(x, self.norm, self.config.rms_norm_eps)


def _window_mask(tokens: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [tokens, tokens]: what is seen."""
    queries = torch.arange(tokens, device=device)[:, None]
    keys = torch.arange(tokens, device=device)
    return (keys <= queries) & (keys > queries - window)
