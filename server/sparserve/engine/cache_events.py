"""What changes in the prefix cache, carried from the engine thread to those who watch it.

A gateway that knows which worker holds which prompt's beginning sends the next one like it there. Nothing
is collected while nobody watches. Prompts under a cache salt are not told: nobody without the salt can
share them, and their tokens are their owner's.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparserve.errors import FellBehind, SparserveError

if TYPE_CHECKING:
    from sparserve.engine.engine import Engine

# Changes that wait for one watcher; more end its watch. A step of 2,048 prompt tokens makes 128.
MAX_BACKLOG = 1 << 16


@dataclass(frozen=True, slots=True)
class BlockStored:
    """A block of a prompt can be shared from now on. `key` names its tokens and all before them."""

    key: bytes
    parent: bytes | None  # the key of the block before it; None: it begins the prompt
    position: int  # blocks before it
    token_ids: array[int]


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    key: bytes


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """Nothing is cached any more."""


CacheEvent = BlockStored | BlockRemoved | CacheCleared


class CacheWatch:
    """Changes in their order; iterate inside `with`. The first are what is cached already, after a
    CacheCleared. Raises FellBehind where more than MAX_BACKLOG pile up unread, and Unavailable at the
    server's end.
    """

    def __init__(self, on_close: Callable[[CacheWatch], None]) -> None:
        self._on_close = on_close
        self._pending: list[CacheEvent] = []
        self._backlog = 0  # of what is pending, without what was cached at the beginning
        self._has_begun = False
        self._error: SparserveError | None = None
        self._arrived = asyncio.Event()

    def begin(self, cached: list[CacheEvent]) -> None:
        """However many they are, they are not a backlog."""
        self._has_begun = True
        self._pending += cached
        self._arrived.set()

    def put(self, events: list[CacheEvent]) -> None:
        if not self._has_begun or self._error is not None:
            return  # what is cached when it begins has these
        self._backlog += len(events)
        if self._backlog > MAX_BACKLOG:
            self.fail(FellBehind(self._backlog, MAX_BACKLOG))
            return
        self._pending += events
        self._arrived.set()

    def fail(self, error: SparserveError) -> None:
        self._error, self._pending = error, []
        self._arrived.set()

    def __aiter__(self) -> CacheWatch:
        return self

    async def __anext__(self) -> list[CacheEvent]:
        """All that came since the last call; waits where nothing did."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
        events, self._pending, self._backlog = self._pending, [], 0
        return events

    def __enter__(self) -> CacheWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self._on_close(self)


class CacheFeed:
    """Watchers live on the event loop; `hand_over`, and what `command` runs, on the engine thread."""

    def __init__(
        self,
        engine: Engine,
        command: Callable[[Callable[[], None]], None],
        post: Callable[..., None],
    ) -> None:
        """`command` runs a function on the engine thread, `post` one with arguments on the event loop; both
        keep the order.
        """
        self._engine = engine
        self._command = command
        self._post = post
        self._watches: set[CacheWatch] = set()
        self._changes: list[CacheEvent] = []  # the engine thread's

    def watch(self) -> CacheWatch:
        watch = CacheWatch(self._close)
        self._watches.add(watch)

        def begin() -> None:
            self._engine.watch_cache(self._changes.append)
            self._post(watch.begin, [CacheCleared(), *self._engine.cached_prefixes()])

        self._command(begin)
        return watch

    def hand_over(self) -> None:
        """What changed goes to the watchers, in one call."""
        if self._changes:
            changes = self._changes[:]
            self._changes.clear()
            self._post(self._deliver, changes)

    def fail(self, error: SparserveError) -> None:
        """The end of all watches."""
        for watch in self._watches:
            watch.fail(error)

    def _deliver(self, events: list[CacheEvent]) -> None:
        for watch in self._watches:
            watch.put(events)

    def _close(self, watch: CacheWatch) -> None:
        self._watches.discard(watch)
        if not self._watches:
            self._command(lambda: self._engine.watch_cache(None))
