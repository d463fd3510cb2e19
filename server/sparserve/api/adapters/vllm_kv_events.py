"""Changes of the prefix cache as `smg.grpc.common.KvEventBatch`, for exact cache-aware routing."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from sparserve.api.adapters.vllm_stubs import common_pb2 as pb
from sparserve.engine.cache_events import (
    BlockRemoved,
    BlockStored,
    CacheCleared,
    CacheEvent,
    CacheWatch,
)
from sparserve.model.backend import BLOCK_SIZE

# Blocks in a message: what is cached when a subscription begins can be more than one message holds.
MAX_BATCH_BLOCKS = 4096


async def kv_event_batches(watch: CacheWatch) -> AsyncIterator[Any]:
    """Batches with consecutive numbers from 1 on; the first ones are what is cached already."""
    number = event_id = 0
    async for changes in watch:
        for start in range(0, len(changes), MAX_BATCH_BLOCKS):
            number += 1
            batch = pb.KvEventBatch(sequence_number=number, timestamp=time.time())
            for event in kv_events(changes[start : start + MAX_BATCH_BLOCKS]):
                event_id += 1
                event.event_id = event_id
                batch.events.append(event)
            yield batch


def kv_events(changes: Iterable[CacheEvent]) -> Iterator[Any]:
    """In the same order; neighbours of a kind are one event, of stored blocks those that follow each other in a
    prompt.
    """
    open_event: Any = None
    last: bytes | None = None  # the block that `open_event` can be continued after
    for change in changes:
        kind = open_event.WhichOneof("data") if open_event is not None else None
        match change:
            case BlockStored() if kind == "stored" and change.parent == last:
                open_event.stored.blocks.append(_block(change))
            case BlockRemoved() if kind == "removed":
                open_event.removed.block_hashes.append(block_hash(change.key))
            case _:
                if open_event is not None:
                    yield open_event
                open_event = _event(change)
        last = change.key if isinstance(change, BlockStored) else None
    if open_event is not None:
        yield open_event


def block_hash(key: bytes) -> int:
    """The 64 bits that stand for a block's key on the wire."""
    return int.from_bytes(key[:8], "little", signed=True)


def _event(change: CacheEvent) -> Any:
    match change:
        case BlockStored():
            parent = None if change.parent is None else block_hash(change.parent)
            stored = pb.KvBlocksStored(blocks=[_block(change)], parent_block_hash=parent)
            return pb.KvCacheEvent(stored=stored)
        case BlockRemoved():
            removed = pb.KvBlocksRemoved(block_hashes=[block_hash(change.key)])
            return pb.KvCacheEvent(removed=removed)
        case CacheCleared():
            return pb.KvCacheEvent(cleared=pb.KvCacheCleared())


def _block(stored: BlockStored) -> Any:
    return pb.KvBlock(
        block_hash=block_hash(stored.key), token_ids=stored.token_ids, block_size=BLOCK_SIZE
    )
