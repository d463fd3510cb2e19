"""Which KV blocks are free, who wrote the others, and which hold a prompt that may come again."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from sparse_kernels.choice import Score
from sparserve.engine.cache_events import BlockRemoved, BlockStored, CacheCleared, CacheEvent
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


@dataclass(frozen=True, slots=True)
class StatisticsKind:
    """What statistics add up (see `statistics.neuron_scores`); those of different kinds are never mixed."""

    score: Score = Score.NORM
    share: float = 1.0


# Kinds of statistics that a cached block keeps, each about half as large as its KV. Of one more, the oldest
# is forgotten: callers choose shares freely.
MAX_STATISTICS = 2


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` positions."""
    return -(-num_tokens // BLOCK_SIZE)


def prefix_keys(token_ids: Sequence[int], salt: str) -> list[bytes]:
    """A key for each whole block of a prompt: it names the block's tokens, all before them, and the salt.

    A chain of hashes. They are cryptographic: equal keys let one request read what another wrote.
    """
    # `person` keeps a salt from passing for a block.
    root = hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=32, person=b"salt")
    key = root.digest()
    keys = []
    for start in range(0, len(token_ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
        block = array("q", token_ids[start : start + BLOCK_SIZE]).tobytes()
        key = hashlib.blake2b(key + block, digest_size=32).digest()
        keys.append(key)
    return keys


@dataclass(slots=True)
class CachedBlock:
    """A whole block of some prompt, written by prefill, all neurons read (PREFILLED)."""

    key: bytes
    block: int
    stored: BlockStored | None = None  # None: watchers are not told of it
    # [num_layers, intermediate] fp16 of each kind that was collected
    statistics: dict[StatisticsKind, torch.Tensor] = field(default_factory=dict)

    def keep(self, kind: StatisticsKind, statistics: torch.Tensor) -> None:
        """Equal KV has equal statistics: those that are known stay."""
        self.statistics.setdefault(kind, statistics)
        if len(self.statistics) > MAX_STATISTICS:
            del self.statistics[next(iter(self.statistics))]


class BlockManager:
    """A fixed pool. A block is in use by as many sequences as share it, or idle: nobody's, but still
    holding a cached prompt; or free. Idle ones are taken when the free ones are gone, least recently used
    first.
    """

    def __init__(self, num_blocks: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self._prefix_cache = prefix_cache
        self._free: deque[int] = deque(range(num_blocks))
        self._users: dict[int, int] = {}  # block -> sequences that hold it, >= 1
        self._provenance: dict[int, Provenance] = {}  # of the blocks in use
        self._cached: dict[bytes, CachedBlock] = {}
        self._cached_in: dict[int, CachedBlock] = {}  # by block
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.on_change: Callable[[CacheEvent], None] | None = (
            None  # is told what happens to the cache
        )

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give, idle ones among them."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return len(self._users)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def allocate(self, count: int) -> list[int]:
        assert count <= self.num_free, "the scheduler asks before it allocates"
        blocks = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._users[block] = 1
            self._provenance[block] = PREFILLED
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """One sequence less holds these blocks of its table."""
        # Backwards, so that of a prompt nobody uses the end is forgotten first.
        for block in reversed(blocks):
            self._users[block] -= 1  # KeyError: freed twice
            if self._users[block] == 0:
                del self._users[block], self._provenance[block]
                if block in self._cached_in:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def mark(self, block: int, provenance: Provenance) -> None:
        assert self._users[block] == 1, "shared blocks are whole and stay as they are"
        assert block not in self._cached_in, "cached blocks stay as they are"
        self._provenance[block] = provenance

    def provenance(self, block: int) -> Provenance:
        return self._provenance[block]

    def share(
        self, keys: Sequence[bytes], *, with_statistics: StatisticsKind | None = None
    ) -> list[CachedBlock]:
        """The cached blocks of a prompt's beginning, now in use by one sequence more; `free` them later.
        Only those `with_statistics` of a kind, where that is given."""
        found = []
        for key in keys:
            cached = self._cached.get(key)
            if cached is None:
                break
            if with_statistics is not None and with_statistics not in cached.statistics:
                break
            found.append(cached)
        for cached in found:
            self._users[cached.block] = self._users.get(cached.block, 0) + 1
            self._provenance[cached.block] = PREFILLED
            self._idle.pop(cached.block, None)
        return found

    def publish(
        self,
        block: int,
        key: bytes,
        kind: StatisticsKind | None = None,
        statistics: torch.Tensor | None = None,
        *,
        stored: BlockStored | None = None,
    ) -> None:
        """`block`, in use and whole, holds the KV that `key` names; prompts to come may share it, and its
        `statistics` of a kind where they were collected. `stored` is what watchers are told of it."""
        assert self._provenance[block] == PREFILLED
        if not self._prefix_cache:
            return
        known = self._cached.get(key)
        if known is None:
            known = self._cached[key] = self._cached_in[block] = CachedBlock(key, block, stored)
            if stored is not None:
                self._tell(stored)
        if kind is not None and statistics is not None:
            known.keep(kind, statistics)

    def told_blocks(self) -> list[BlockStored]:
        """What watchers would have been told, the beginnings of prompts first."""
        told = [cached.stored for cached in self._cached.values() if cached.stored is not None]
        return sorted(told, key=lambda stored: stored.position)

    def forget_cached(self) -> None:
        """Nothing is cached any more; blocks in use stay whose they are."""
        self._free.extend(self._idle)
        for known in (self._idle, self._cached, self._cached_in):
            known.clear()
        self._tell(CacheCleared())

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        cached = self._cached_in.pop(block)
        del self._cached[cached.key]
        if cached.stored is not None:
            self._tell(BlockRemoved(cached.key))
        return block

    def _tell(self, event: CacheEvent) -> None:
        if self.on_change is not None:
            self.on_change(event)
