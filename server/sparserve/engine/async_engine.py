"""The engine's asyncio face: owns the engine thread, carries requests in and updates out."""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

from sparserve.engine.cache_events import CacheFeed, CacheWatch
from sparserve.engine.constraint import CompiledConstraint, Constraint
from sparserve.engine.engine import Engine
from sparserve.engine.request import FinishReason, GenerationRequest, Update
from sparserve.engine.stream import Meter, RequestStream
from sparserve.errors import (
    DuplicateRequest,
    EngineFailure,
    QueueFull,
    RequestError,
    SparserveError,
    Unavailable,
)

if TYPE_CHECKING:
    from sparserve.engine.grammar import ConstraintCompiler

log = logging.getLogger(__name__)

# Python hands the GIL over after so long; the default of 5 ms is longer than a fast engine step.
_GIL_SWITCH_INTERVAL = 0.0005

# A call that is cancelled so shortly before its deadline has met it: the client's clock began earlier
# by the time that the request was under way.
DEADLINE_SLACK_SECONDS = 0.1

# Stopping waits so long for the current step to end.
_LAST_STEP_SECONDS = 10.0


class EngineState(Enum):
    READY = "ready"
    DRAINING = "draining"
    BROKEN = "broken"
    STOPPED = "stopped"


class AsyncEngine:
    """Construct and use it on one event loop; the forward runs on a thread of its own.

    `on_state` is called on that loop whenever `state` changes.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int,
        max_waiting_tokens: int,
        max_stream_backlog: int,
        on_state: Callable[[EngineState], None] = lambda state: None,
    ) -> None:
        self.engine = engine
        self._compiler: ConstraintCompiler | None = None
        self._compiler_made = asyncio.Lock()
        self.max_waiting = max_waiting
        self.max_waiting_tokens = max_waiting_tokens
        self.max_stream_backlog = max_stream_backlog
        self.state = EngineState.READY
        self._on_state = on_state
        self._loop = asyncio.get_running_loop()
        self._counter = itertools.count()
        self._streams: dict[str, RequestStream] = {}  # by the engine's key
        self._keys: dict[tuple[str, str], str] = {}  # (owner, request id) -> the engine's key
        self._idle = asyncio.Event()
        self._idle.set()
        self._commands: list[Callable[[], list[Update] | None]] = []
        self._flushes: set[asyncio.Future[bool]] = set()
        self._cache = CacheFeed(engine, self._command, self._post)
        self._wake = threading.Condition()
        self._stopping = False
        sys.setswitchinterval(min(sys.getswitchinterval(), _GIL_SWITCH_INTERVAL))
        self._thread = threading.Thread(target=self._run, name="sparserve-engine", daemon=True)
        self._thread.start()

    @property
    def in_flight(self) -> int:
        return len(self._streams)

    def submit(self, request: GenerationRequest, meter: Meter | None = None) -> RequestStream:
        """Take a request; use the stream as a context manager.

        Raises InvalidRequest, PromptTooLong, DuplicateRequest, QueueFull or Unavailable, and what the meter does.
        """
        self._check_admission(request)
        if meter is not None:
            meter.admit(len(request.prompt_token_ids))
        # The engine gets a key of its own: an id may be used again while the last updates of its
        # former, aborted request are still on their way.
        key = f"{request.request_id}#{next(self._counter)}"

        def close() -> None:
            if key in self._streams:
                # gRPC cancels a call at its deadline, mostly before the engine looks at the clock.
                end = request.deadline
                late = end is not None and time.monotonic() >= end - DEADLINE_SLACK_SECONDS
                reason = FinishReason.DEADLINE if late else FinishReason.CANCELLED
                self._command(partial(self._abort_silently, key, reason))
                self._forget(key)

        stream = self._streams[key] = RequestStream(
            request.request_id,
            request.sampling.n,
            self.max_stream_backlog,
            close,
            len(request.prompt_token_ids),
            request.owner,
            meter,
        )
        self._keys[request.owner, request.request_id] = key
        self._idle.clear()
        self._command(lambda: self.engine.add(replace(request, request_id=key)))
        return stream

    async def compile(self, constraint: Constraint) -> CompiledConstraint:
        """For `GenerationRequest.constraint`; the first takes seconds longer.

        Raises InvalidRequest where the constraint cannot be used, QueueFull or Unavailable.
        """
        async with self._compiler_made:
            if self._stopping:
                raise Unavailable("the server is stopping")
            if self._compiler is None:
                self._compiler = await asyncio.to_thread(self._make_compiler)
        return await self._compiler.compile(constraint)

    def _make_compiler(self) -> ConstraintCompiler:
        from sparserve.engine.grammar import ConstraintCompiler  # seconds, which many never need

        config, metrics = self.engine.backend.config, self.engine.metrics
        return ConstraintCompiler(
            self.engine.tokenizer.tokenizer,
            config.vocab_size,
            config.eos_token_ids,
            on_compiled=lambda kind, seconds: metrics.constraint_compilation.labels(
                kind=kind.value
            ).observe(seconds),
        )

    async def warm_up(self) -> None:
        """Run the engine's warm-up on its thread. Raises what it raises."""
        done: asyncio.Future[None] = self._loop.create_future()

        def run() -> None:
            try:
                self.engine.warm_up()
                self._post(done.set_result, None)
            except Exception as error:
                self._post(done.set_exception, error)

        self._command(run)
        await done

    def abort(self, request_id: str, owner: str | None = "") -> bool:
        """End the owner's request, None: those of all owners with this id, with FinishReason.CANCELLED.

        False where none is in flight.
        """
        if owner is None:
            found = [each for each in self._keys if each[1] == request_id]
        else:
            found = [(owner, request_id)] if (owner, request_id) in self._keys else []
        for each in found:
            self._command(partial(self.engine.abort, self._keys.pop(each)))
        return bool(found)

    def watch_cache(self) -> CacheWatch:
        """What is in the prefix cache, and what changes there. Raises Unavailable."""
        if self.state is not EngineState.READY:
            raise Unavailable(f"the server is {self.state.value}")
        return self._cache.watch()

    async def flush_cache(self, timeout: float) -> bool:
        """Forget all cached prompts once no request is in flight; False where `timeout` seconds pass before.
        Raises Unavailable.
        """
        if self.state in (EngineState.BROKEN, EngineState.STOPPED):
            raise Unavailable(f"the server is {self.state.value}")
        if self._streams:
            try:
                await asyncio.wait_for(self._idle.wait(), timeout)
            except TimeoutError:
                return False
        if self.state in (EngineState.BROKEN, EngineState.STOPPED):
            raise Unavailable(f"the server is {self.state.value}")
        flushed: asyncio.Future[bool] = self._loop.create_future()
        self._flushes.add(flushed)
        flushed.add_done_callback(self._flushes.discard)
        self._command(lambda: self._post(_resolve, flushed, self.engine.flush_cache()))
        return await flushed

    async def drain(self, timeout: float) -> None:
        """Take no new requests, wait up to `timeout` seconds for those in flight, end the rest and all
        watches."""
        if self.state is EngineState.READY:
            self._set_state(EngineState.DRAINING)
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            log.warning(
                "drain timed out after %g s with %d requests in flight", timeout, self.in_flight
            )
            for key in list(self._streams):
                self._command(partial(self._abort_silently, key))
            self._fail_all(Unavailable("the server stopped before this request was done", 1.0))
        self._cache.fail(Unavailable("the server stops"))

    async def stop(self) -> bool:
        """End the engine thread after its current step; requests still in flight are failed.

        False where the step does not end: the thread is left behind, and the process had better exit.
        """
        async with self._compiler_made:
            if self._compiler is not None:
                await asyncio.to_thread(self._compiler.close)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        waiting = time.monotonic() + _LAST_STEP_SECONDS
        while self._thread.is_alive() and time.monotonic() < waiting:
            await asyncio.sleep(0.005)
        if self._thread.is_alive():
            log.error("the engine has not ended its step for %g s", _LAST_STEP_SECONDS)
        self._set_state(EngineState.STOPPED)
        self._fail_all(Unavailable("the server stopped before this request was done"))
        return not self._thread.is_alive()

    def _abort_silently(self, key: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """On the engine thread: nobody listens to this request any more."""
        self.engine.abort(key, reason)

    def _check_admission(self, request: GenerationRequest) -> None:
        self.check_room(request.sampling.n, len(request.prompt_token_ids))
        try:
            self.engine.validate(request)
            if (request.owner, request.request_id) in self._keys:
                raise DuplicateRequest(request.request_id)
        except RequestError:
            self.engine.metrics.requests_rejected.labels(reason="invalid").inc()
            raise

    def check_room(self, choices: int = 1, prompt_tokens: int = 0) -> None:
        """Raises QueueFull or Unavailable where `submit` would, before work goes into a request."""
        rejected = self.engine.metrics.requests_rejected
        if self.state is not EngineState.READY:
            rejected.labels(reason="unavailable").inc()
            raise Unavailable(
                f"the server is {self.state.value} and takes no new requests",
                retry_after=1.0 if self.state is EngineState.DRAINING else None,
            )
        limit = self.engine.limits.max_running + self.max_waiting
        in_flight = sum(stream.choices for stream in self._streams.values())
        waiting = sum(stream.waiting_tokens for stream in self._streams.values())
        # A request larger than either limit still gets its turn, alone.
        if in_flight and in_flight + choices > limit:
            rejected.labels(reason="queue_full").inc()
            raise QueueFull("requests in flight", in_flight, limit, retry_after=1.0)
        if waiting and waiting + prompt_tokens > self.max_waiting_tokens:
            rejected.labels(reason="queue_full").inc()
            what = "prompt tokens waiting"
            raise QueueFull(what, waiting, self.max_waiting_tokens, retry_after=1.0)

    def _command(self, command: Callable[[], list[Update] | None]) -> None:
        """Run `command` on the engine thread before its next step."""
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._run_once():
                pass
        except BaseException:
            # Nothing below is meant to raise; whatever it was, nobody may be left waiting.
            error_id = uuid.uuid4().hex[:12]
            log.critical("the engine thread died, error id %s", error_id, exc_info=True)
            self._post(self._break, EngineFailure(error_id))

    def _run_once(self) -> bool:
        with self._wake:
            while not (self._commands or self._stopping or self.engine.has_work):
                self._wake.wait()
            commands, self._commands = self._commands, []
            stopping = self._stopping
        updates = [update for command in commands for update in command() or ()]
        if stopping:
            return False
        if self.engine.has_work:
            updates += self.engine.step()
        if updates:
            self._post(self._deliver, updates)
        self._cache.hand_over()
        if self.engine.broken is not None:
            self._post(self._break, self.engine.broken)
            return False
        return True

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed: nobody is there to tell
            log.warning("the event loop closed before the engine stopped")

    def _deliver(self, updates: list[Update]) -> None:
        for update in updates:
            stream = self._streams.get(update.request_id)
            if stream is None:
                continue
            stream.put(update)
            if stream.is_complete:
                if stream.is_slow:
                    self.engine.metrics.slow_readers.inc()
                if stream.has_failed:  # others of its choices may still run
                    self._command(partial(self._abort_silently, update.request_id))
                self._forget(update.request_id)

    def _forget(self, key: str) -> None:
        """The request has ended, read or not: its id and its place are free."""
        stream = self._streams.pop(key)
        id = stream.owner, stream.request_id
        if self._keys.get(id) == key:  # not that of a later request
            del self._keys[id]
        if not self._streams:
            self._idle.set()

    def _break(self, error: SparserveError) -> None:
        self._set_state(EngineState.BROKEN)
        self._fail_all(error)
        self._cache.fail(error)

    def _fail_all(self, error: SparserveError) -> None:
        for key, stream in list(self._streams.items()):
            stream.fail(error)
            self._forget(key)
        for flushed in list(self._flushes):
            if not flushed.done():
                flushed.set_exception(error)

    def _set_state(self, state: EngineState) -> None:
        if state is not self.state:
            self.state = state
            self._on_state(state)


def _resolve(flushed: asyncio.Future[bool], value: bool) -> None:
    if not flushed.done():  # whoever asked may have left
        flushed.set_result(value)
