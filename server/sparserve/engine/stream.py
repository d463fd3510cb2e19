"""One request's updates, on the event loop, from who makes them to who reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from sparserve.engine.request import Update
from sparserve.errors import SlowReader, SparserveError


class Meter(Protocol):
    """Who is told of a request's tokens, on the event loop."""

    def admit(self, prompt_tokens: int) -> None:
        """Once, when all else speaks for the request; what this raises refuses it."""

    def charge(self, tokens: int) -> None:
        """New tokens, read or not."""


class RequestStream:
    """Updates of one request; iterate inside `with`, which aborts it when left early.

    Updates of a choice that pile up while nobody reads are merged into one. More than `max_backlog`
    tokens are not kept: the request ends with SlowReader.
    """

    def __init__(
        self,
        request_id: str,
        choices: int,
        max_backlog: int,
        on_close: Callable[[], None],
        prompt_tokens: int = 0,
        owner: str = "",
        meter: Meter | None = None,
    ) -> None:
        self.request_id = request_id
        self.owner = owner
        self._meter = meter
        self.choices = choices
        self.waiting_tokens = prompt_tokens  # none once something was put
        self._on_close = on_close
        self._max_backlog = max_backlog
        self._pending: dict[int, Update] = {}  # by choice, in the order of arrival
        self._backlog = 0  # tokens in them
        self._error: SparserveError | None = None  # raised once they are read
        self._unfinished = choices
        self._arrived = asyncio.Event()

    @property
    def is_complete(self) -> bool:
        """Nothing more will be put, read or not."""
        return self._unfinished == 0

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    @property
    def is_slow(self) -> bool:
        return isinstance(self._error, SlowReader)

    def put(self, update: Update) -> None:
        """Called by the engine's owner on the event loop."""
        self.waiting_tokens = 0
        if self._meter is not None and update.tokens:
            self._meter.charge(len(update.tokens))
        if self.is_complete:
            return
        if update.finish is not None:
            self._unfinished -= 1
            if update.finish.error is not None:
                self._fail(update.finish.error)
                update = replace(update, finish=None)
        if update.text or update.tokens or update.prompt or update.finish:
            earlier = self._pending.get(update.index)
            self._pending[update.index] = earlier + update if earlier else update
            self._backlog += len(update.tokens)
        if self._backlog > self._max_backlog and not self.is_complete:
            self._fail(SlowReader(self._backlog, self._max_backlog))
        self._arrived.set()

    def fail(self, error: SparserveError) -> None:
        """The end of all choices."""
        self._fail(error)
        self._arrived.set()

    def _fail(self, error: SparserveError) -> None:
        self._error, self._unfinished = self._error or error, 0

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Update:
        """Raises the request's own error (EngineFailure, DeadlineExceeded, Unavailable, SlowReader) at its
        end, after what was generated.
        """
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self.is_complete:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        update = self._pending.pop(next(iter(self._pending)))
        self._backlog -= len(update.tokens)
        return update

    def __enter__(self) -> RequestStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._on_close()
