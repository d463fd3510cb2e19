"""Paged KV cache of the torch backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparserve.model.backend import BLOCK_SIZE
from sparserve.model.config import ModelConfig


def bytes_per_block(config: ModelConfig, dtype: torch.dtype) -> int:
    """K and V of all layers for BLOCK_SIZE positions."""
    heads = sum(own.num_kv_heads for own in config.layers)
    return 2 * heads * BLOCK_SIZE * config.head_dim * dtype.itemsize


class PagedKVCache:
    """K and V of every layer in blocks of BLOCK_SIZE positions."""

    def __init__(self, config: ModelConfig, num_blocks: int, dtype: torch.dtype) -> None:
        # Of each layer [2, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim].
        self._layers = [
            torch.zeros(2, num_blocks, BLOCK_SIZE, own.num_kv_heads, config.head_dim, dtype=dtype)
            for own in config.layers
        ]
        self.num_blocks = num_blocks

    @staticmethod
    def slots(block_table: Sequence[int], start: int, stop: int) -> torch.Tensor:
        """Slot of each position in [start, stop): block id * BLOCK_SIZE + offset, int64."""
        positions = torch.arange(start, stop)
        table = torch.tensor(block_table, dtype=torch.int64)
        return table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v [tokens, num_kv_heads, head_dim] -> slots [tokens]."""
        flat = self._layers[layer].flatten(1, 2)  # [2, num_slots, num_kv_heads, head_dim]
        flat[0].index_copy_(0, slots, k.to(flat))
        flat[1].index_copy_(0, slots, v.to(flat))

    def gather(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> k, v [num_kv_heads, tokens, head_dim] float32."""
        k, v = self._layers[layer].flatten(1, 2).index_select(1, slots).transpose(1, 2).float()
        return k, v

    def read_blocks(self, block_ids: Sequence[int]) -> torch.Tensor:
        """-> [blocks, numbers of all layers], a copy."""
        places = list(block_ids)
        parts = [own[:, places].transpose(0, 1).flatten(1) for own in self._layers]
        return torch.cat(parts, dim=1)

    def write_blocks(self, block_ids: Sequence[int], blocks: torch.Tensor) -> None:
        places = list(block_ids)
        sizes = [own[:, 0].numel() for own in self._layers]
        for own, part in zip(self._layers, torch.split(blocks, sizes, dim=1), strict=True):
            own[:, places] = part.view(len(places), 2, *own.shape[2:]).transpose(0, 1)
