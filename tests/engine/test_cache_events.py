"""What the prefix cache tells of itself is what it holds."""

import random

from sparserve.engine import cache_events
from sparserve.engine.cache_events import BlockRemoved, BlockStored, CacheCleared, CacheEvent
from sparserve.engine.request import GenerationRequest, SamplingParams, StoppingParams
from sparserve.errors import FellBehind
from sparserve.model.backend import BLOCK_SIZE


def test_what_is_cached_at_the_beginning_is_no_backlog(monkeypatch):
    monkeypatch.setattr(cache_events, "MAX_BACKLOG", 3)
    watch = cache_events.CacheWatch(lambda _: None)
    watch.begin([CacheCleared()] * 10)
    watch.put([CacheCleared()] * 3)
    assert watch._error is None
    watch.put([CacheCleared()])
    assert isinstance(watch._error, FellBehind)


def test_events_add_up_to_the_cache_while_blocks_are_evicted(tiny_engine):
    """Of a pool that holds two contexts; prompts share beginnings, and some have a salt."""
    engine = tiny_engine(max_context=128, kv_cache_gib=17 * BLOCK_SIZE * 512 / (1 << 30))
    told: list[CacheEvent] = []
    engine.watch_cache(told.append)
    mirror: dict[bytes, BlockStored] = {}
    draw = random.Random(1)
    kinds = set()
    for number in range(60):
        begin = (number % 3,) * draw.randrange(0, 80)
        prompt = begin + tuple(draw.randrange(250) for _ in range(draw.randrange(1, 40)))
        engine.add(
            GenerationRequest(
                str(number),
                prompt,
                sampling=SamplingParams(temperature=0.0),
                stopping=StoppingParams(max_tokens=3),
                cache_salt="salt" if number % 7 == 0 else "",
            )
        )
        if number == 40:
            assert not engine.flush_cache()  # a request is in flight
        while engine.has_work:
            engine.step()
        if number == 40:
            assert engine.flush_cache()
        for event in told:
            match event:
                case BlockStored(key=key):
                    assert key not in mirror
                    mirror[key] = event
                case BlockRemoved(key=key):
                    del mirror[key]
                case CacheCleared():
                    mirror.clear()
            kinds.add(type(event))
        told.clear()
        assert mirror == {stored.key: stored for stored in engine.cached_prefixes()}
    assert kinds == {BlockStored, BlockRemoved, CacheCleared}
