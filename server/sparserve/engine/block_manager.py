"""Which KV blocks are free, and who wrote the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from sparserve.model.backend import BLOCK_SIZE, Phase


@dataclass(frozen=True, slots=True)
class Provenance:
    """What wrote a block's KV. Prefill can write it again bit for bit, decode cannot.

    `neurons` names what the steps really read, not what was asked for: two prompts under one core policy
    read different neurons, and their KV must not be mixed.
    """

    phase: Phase
    neurons: str


ALL_NEURONS = "all"
PREFILLED = Provenance(Phase.PREFILL, ALL_NEURONS)
DECODED = Provenance(Phase.DECODE, ALL_NEURONS)


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` positions."""
    return -(-num_tokens // BLOCK_SIZE)


class BlockManager:
    """A fixed pool; every block is free or in exactly one block table."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._provenance: dict[int, Provenance] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def allocate(self, count: int) -> list[int]:
        assert count <= len(self._free), "the scheduler asks before it allocates"
        blocks = [self._free.popleft() for _ in range(count)]
        self._provenance.update(dict.fromkeys(blocks, PREFILLED))
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            del self._provenance[block]  # KeyError: freed twice
        self._free.extend(blocks)

    def mark(self, block: int, provenance: Provenance) -> None:
        assert block in self._provenance, "only blocks in use have a provenance"
        self._provenance[block] = provenance

    def provenance(self, block: int) -> Provenance:
        return self._provenance[block]
