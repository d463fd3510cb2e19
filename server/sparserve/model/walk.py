"""A model's layers one after another in plain torch, for windows of a text: only one layer is in memory at
a time."""

from __future__ import annotations

from copy import copy

import torch
import torch.nn.functional as F

from sparserve.model import llama
from sparserve.model.loader import LoadedModel
from sparserve.model.weights import LayerWeights


class Walk:
    """`x` [windows, tokens, hidden] float32 goes into the next layer; whoever walks adds to it, a window at a
    time: what is in between is several times as wide."""

    def __init__(self, model: LoadedModel, token_ids: torch.Tensor) -> None:
        """token_ids [windows, tokens]"""
        self.config, weights = model.config, model.weights
        config = self.config
        frequencies = llama.rope_frequencies(
            config.rope, config.head_dim, weights.rope_factors, config.max_position_embeddings
        )
        self._tokens = token_ids.shape[1]
        self._tables = llama.rope_tables(
            torch.arange(self._tokens), frequencies, config.rope.attention_factor
        )
        self.x = weights.embedding[token_ids].float()

    def branch(self) -> Walk:
        """Another walk from here on."""
        other = copy(self)
        other.x = self.x.clone()
        return other

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return llama.rms_norm(x, weight, self.config.rms_norm_eps)

    def heads(self, index: int, layer: LayerWeights, normed: torch.Tensor) -> torch.Tensor:
        """What attention of layer `index` makes of a window: normed [tokens, hidden] -> [tokens, heads *
        head_dim], before the output projection."""
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        q, k, v = (
            llama.project_heads(F.linear, normed, weight, bias, norm, eps, head_dim)
            for weight, bias, norm in (
                (layer.wq, layer.bq, layer.q_norm),
                (layer.wk, layer.bk, layer.k_norm),
                (layer.wv, layer.bv, None),
            )
        )
        q, k = (llama.apply_rope(heads, *self._tables) for heads in (q, k))
        mask = _causal(self._tokens, self.config.window(index))
        return llama.attention(q, k.transpose(0, 1), v.transpose(0, 1), mask)

    def add_attention(self, index: int, layer: LayerWeights) -> None:
        for own in self.x:
            heads = self.heads(index, layer, self.norm(own, layer.attn_norm))
            own += F.linear(heads, layer.wo, layer.bo)

    def add_feed_forward(self, layer: LayerWeights) -> None:
        for own in self.x:
            made = activations(layer, self.norm(own, layer.mlp_norm))
            own += F.linear(made, layer.w_down, layer.bd)


def activations(layer: LayerWeights, normed: torch.Tensor) -> torch.Tensor:
    """normed [tokens, hidden] -> [tokens, neurons], what goes into down."""
    gate, up = llama.gate_and_up(F.linear, normed, layer)
    return gate * up


def _causal(tokens: int, window: int) -> torch.Tensor:
    """[tokens, tokens]: 0, or -inf for what a token does not see."""
    queries, keys = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    hidden = keys > queries
    if window:
        hidden |= keys <= queries - window
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
