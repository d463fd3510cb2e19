"""Paged KV cache of the torch backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparserve.model.backend import BLOCK_SIZE
from sparserve.model.config import ModelConfig


def bytes_per_block(config: ModelConfig, dtype: torch.dtype) -> int:
    """K and V of all layers for BLOCK_SIZE positions."""
    return (
        2 * config.num_layers * BLOCK_SIZE * config.num_kv_heads * config.head_dim * dtype.itemsize
    )


class PagedKVCache:
    """K and V of every layer in blocks of BLOCK_SIZE positions."""

    def __init__(self, config: ModelConfig, num_blocks: int, dtype: torch.dtype) -> None:
        shape = (config.num_layers, 2, num_blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        self.data = torch.zeros(shape, dtype=dtype)
        self.num_blocks = num_blocks

    @staticmethod
    def slots(block_table: Sequence[int], start: int, stop: int) -> torch.Tensor:
        """Slot of each position in [start, stop): block id * BLOCK_SIZE + offset, int64."""
        positions = torch.arange(start, stop)
        table = torch.tensor(block_table, dtype=torch.int64)
        return table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v [tokens, num_kv_heads, head_dim] -> slots [tokens]."""
        flat = self.data[layer].flatten(1, 2)  # [2, num_slots, num_kv_heads, head_dim]
        flat[0].index_copy_(0, slots, k.to(flat))
        flat[1].index_copy_(0, slots, v.to(flat))

    def gather(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> k, v [num_kv_heads, tokens, head_dim] float32."""
        k, v = self.data[layer].flatten(1, 2).index_select(1, slots).transpose(1, 2).float()
        return k, v

    def read_blocks(self, block_ids: Sequence[int]) -> torch.Tensor:
        """-> [blocks, num_layers, 2, BLOCK_SIZE, num_kv_heads, head_dim], a copy."""
        return self.data[:, :, list(block_ids)].movedim(2, 0).contiguous()

    def write_blocks(self, block_ids: Sequence[int], blocks: torch.Tensor) -> None:
        self.data[:, :, list(block_ids)] = blocks.movedim(0, 2)
