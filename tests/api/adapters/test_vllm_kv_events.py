"""Events of the prefix cache, as a gateway that subscribes sees them."""

import asyncio
from typing import Any

import grpc
import pytest
from smg_grpc_proto.generated import common_pb2

from sparserve.client import AsyncClient
from sparserve.engine import cache_events
from sparserve.errors import EngineFailure
from sparserve.model.backend import BLOCK_SIZE

LONG = tuple(range(97, 97 + 26)) * 3  # 78 tokens: four whole blocks and a part


class Index:
    """What a gateway makes of the events: which blocks a worker holds."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.number = 0
        self.events: list[Any] = []
        self.blocks: dict[int, tuple[int | None, tuple[int, ...]]] = {}  # hash -> parent, tokens

    async def read(self) -> list[str]:
        """The kinds of events in the next batch, applied."""
        batch = await self.call.read()
        assert batch.sequence_number == self.number + 1
        self.number = batch.sequence_number
        self.events += batch.events
        for event in batch.events:
            getattr(self, event.WhichOneof("data"))(getattr(event, event.WhichOneof("data")))
        return [event.WhichOneof("data") for event in batch.events]

    def stored(self, event: Any) -> None:
        parent = event.parent_block_hash if event.HasField("parent_block_hash") else None
        for block in event.blocks:
            assert block.block_size == len(block.token_ids) == BLOCK_SIZE
            assert block.block_hash not in self.blocks
            assert parent is None or parent in self.blocks
            self.blocks[block.block_hash] = parent, tuple(block.token_ids)
            parent = block.block_hash

    def removed(self, event: Any) -> None:
        for block_hash in event.block_hashes:
            del self.blocks[block_hash]

    def cleared(self, event: Any) -> None:
        self.blocks.clear()

    def prompts(self) -> set[tuple[int, ...]]:
        """The tokens from the beginning to the end of each block."""
        found = set()
        for block_hash in self.blocks:
            tokens: tuple[int, ...] = ()
            step: int | None = block_hash
            while step is not None:
                parent, own = self.blocks[step]
                tokens, step = own + tokens, parent
            found.add(tokens)
        return found


def beginnings(ids: tuple[int, ...]) -> set[tuple[int, ...]]:
    return {ids[:end] for end in range(BLOCK_SIZE, len(ids) + 1, BLOCK_SIZE)}


@pytest.fixture
def subscribe(peer):
    return lambda **fields: Index(
        peer.stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(**fields))
    )


async def test_a_subscriber_knows_what_is_cached(peer, subscribe):
    early = subscribe()
    assert await early.read() == ["cleared"]
    await peer.complete(ids=LONG)
    assert await early.read() == ["stored"]
    assert early.prompts() == beginnings(LONG)
    longer = LONG[:64] + tuple(range(48))  # four blocks are cached already
    await peer.complete(ids=longer)
    assert await early.read() == ["stored"]
    assert len(early.events[-1].stored.blocks) == 3
    assert early.prompts() == beginnings(LONG) | beginnings(longer)
    late = subscribe()
    await late.read()
    assert late.prompts() == early.prompts()
    assert (await peer.stub.FlushCache(common_pb2.FlushCacheRequest())).success
    assert await early.read() == await late.read() == ["cleared"]
    assert peer.server.engine.engine.cached_blocks == 0
    again = await peer.complete(ids=LONG)
    assert again.cached_tokens == 0


async def test_prompts_under_a_salt_are_not_told(peer, subscribe):
    index = subscribe()
    await index.read()
    async with AsyncClient(f"127.0.0.1:{peer.server.port}") as client:
        await client.generate("secret" * 10, max_tokens=1, cache_salt="mine")
    assert peer.server.engine.engine.cached_blocks > 0
    await peer.complete(ids=LONG)
    await index.read()
    assert index.prompts() == beginnings(LONG)


async def test_a_subscriber_cannot_resume(subscribe):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await subscribe(start_sequence_number=3).read()
    assert refused.value.code() is grpc.StatusCode.OUT_OF_RANGE


async def test_nothing_is_collected_once_the_last_subscriber_has_left(peer, subscribe, until):
    index = subscribe()
    await index.read()
    blocks = peer.server.engine.engine._blocks
    assert blocks.on_change is not None
    index.call.cancel()
    await until(lambda: blocks.on_change is None)
    assert (await peer.complete(ids=LONG)).completion_tokens == 8


async def test_a_watcher_that_reads_nothing_is_ended(peer, monkeypatch, until):
    monkeypatch.setattr(cache_events, "MAX_BACKLOG", 6)
    with peer.server.engine.watch_cache() as watch:
        await until(lambda: watch._has_begun)
        await peer.complete(ids=LONG)
        assert watch._error is None
        await peer.complete(ids=LONG[::-1])
        with pytest.raises(cache_events.FellBehind, match="8 changes"):
            await anext(watch)


async def test_a_flush_waits_for_requests_in_flight(peer, controlled, until):
    with controlled(peer.server) as forward:
        forward.hold()
        call = peer.stub.Generate(peer.request_of(ids=LONG, stream=True))
        await until(lambda: forward.calls == 1)
        refused = await peer.stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=0.05))
        assert (refused.success, refused.message) == (False, "1 requests are in flight")
        flush = peer.stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=60))
        await asyncio.sleep(0.05)
        forward.release()
        assert (await flush).success
    assert peer.server.engine.engine.cached_blocks == 0
    call.cancel()


async def test_a_flush_that_waits_ends_where_the_engine_breaks(peer, controlled, until):
    engine = peer.server.engine
    with controlled(peer.server) as forward:
        forward.hold()
        stream = peer.stub.Generate(peer.request_of(ids=LONG, stream=True))
        await until(lambda: forward.calls == 1)
        flush = asyncio.ensure_future(
            peer.stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=60))
        )
        await asyncio.sleep(0.05)
        engine._break(EngineFailure("x"))
        with pytest.raises(grpc.aio.AioRpcError):
            await asyncio.wait_for(flush, 10)
        stream.cancel()
