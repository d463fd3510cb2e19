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

from sparserve.engine.engine import Engine
from sparserve.engine.request import Finish, FinishReason, GenerationRequest, Timings, Update
from sparserve.errors import (
    DuplicateRequest,
    EngineFailure,
    QueueFull,
    RequestError,
    SparserveError,
    Unavailable,
)

log = logging.getLogger(__name__)

# Python hands the GIL over after so long; the default of 5 ms is longer than a fast engine step.
_GIL_SWITCH_INTERVAL = 0.0005

# Stopping waits so long for the current step to end.
_LAST_STEP_SECONDS = 10.0


class EngineState(Enum):
    READY = "ready"
    DRAINING = "draining"
    BROKEN = "broken"
    STOPPED = "stopped"


class RequestStream:
    """Updates of one request; iterate inside `with`, which aborts it when left early.

    Updates that pile up while nobody reads are merged into one.
    """

    def __init__(self, request_id: str, on_close: Callable[[], None]) -> None:
        self.request_id = request_id
        self._on_close = on_close
        self._pending: Update | None = None
        self._arrived = asyncio.Event()
        self._finished = False

    def put(self, update: Update) -> None:
        """Called by the engine's owner on the event loop; nothing follows an update with `finish`."""
        if self._pending is None:
            self._pending = update
        elif self._pending.finish is None:
            self._pending = self._pending + update
        self._arrived.set()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Update:
        """Raises the request's own error (EngineFailure, DeadlineExceeded, Unavailable) at its end."""
        if self._finished:
            raise StopAsyncIteration
        await self._arrived.wait()
        update, self._pending = self._pending, None
        assert update is not None
        finish = update.finish
        if finish is not None and finish.error is not None and update.tokens:
            # What was generated goes out first; the error is met at the next call.
            self._pending = Update(update.request_id, finish=finish)
            return replace(update, finish=None)
        self._arrived.clear()
        self._finished = finish is not None
        if finish is not None and finish.error is not None:
            raise finish.error
        return update

    def __enter__(self) -> RequestStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._on_close()


class AsyncEngine:
    """Construct and use it on one event loop; the forward runs on a thread of its own.

    `on_state` is called on that loop whenever `state` changes.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int,
        on_state: Callable[[EngineState], None] = lambda state: None,
    ) -> None:
        self.engine = engine
        self.max_waiting = max_waiting
        self.state = EngineState.READY
        self._on_state = on_state
        self._loop = asyncio.get_running_loop()
        self._counter = itertools.count()
        self._streams: dict[str, RequestStream] = {}  # by the engine's key
        self._keys: dict[str, str] = {}  # request id -> the engine's key
        self._idle = asyncio.Event()
        self._idle.set()
        self._commands: list[Callable[[], Update | None]] = []
        self._wake = threading.Condition()
        self._stopping = False
        sys.setswitchinterval(min(sys.getswitchinterval(), _GIL_SWITCH_INTERVAL))
        self._thread = threading.Thread(target=self._run, name="sparserve-engine", daemon=True)
        self._thread.start()

    @property
    def in_flight(self) -> int:
        return len(self._streams)

    def submit(self, request: GenerationRequest) -> RequestStream:
        """Take a request; use the stream as a context manager.

        Raises InvalidRequest, PromptTooLong, DuplicateRequest, QueueFull or Unavailable.
        """
        self._check_admission(request)
        # The engine gets a key of its own: an id may be used again while the last updates of its
        # former, aborted request are still on their way.
        key = f"{request.request_id}#{next(self._counter)}"

        def close() -> None:
            if key in self._streams:
                self._command(partial(self._abort_silently, key))
                self._forget(key)

        stream = self._streams[key] = RequestStream(request.request_id, close)
        self._keys[request.request_id] = key
        self._idle.clear()
        self._command(lambda: self.engine.add(replace(request, request_id=key)))
        return stream

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

    def abort(self, request_id: str) -> bool:
        """End a request with FinishReason.CANCELLED; False where it is not in flight."""
        key = self._keys.get(request_id)
        if key is None:
            return False
        self._command(lambda: self.engine.abort(key))
        return True

    async def drain(self, timeout: float) -> None:
        """Take no new requests, wait up to `timeout` seconds for those in flight, end the rest."""
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

    async def stop(self) -> bool:
        """End the engine thread after its current step; requests still in flight are failed.

        False where the step does not end: the thread is left behind, and the process had better exit.
        """
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

    def _abort_silently(self, key: str) -> None:
        """On the engine thread: nobody listens to this request any more."""
        self.engine.abort(key)

    def _check_admission(self, request: GenerationRequest) -> None:
        self.check_room()
        try:
            self.engine.validate(request)
            if request.request_id in self._keys:
                raise DuplicateRequest(request.request_id)
        except RequestError:
            self.engine.metrics.requests_rejected.labels(reason="invalid").inc()
            raise

    def check_room(self) -> None:
        """Raises QueueFull or Unavailable where `submit` would, before work goes into a request."""
        rejected = self.engine.metrics.requests_rejected
        if self.state is not EngineState.READY:
            rejected.labels(reason="unavailable").inc()
            raise Unavailable(
                f"the server is {self.state.value} and takes no new requests",
                retry_after=1.0 if self.state is EngineState.DRAINING else None,
            )
        limit = self.engine.limits.max_running + self.max_waiting
        if self.in_flight >= limit:
            rejected.labels(reason="queue_full").inc()
            raise QueueFull(self.in_flight, limit, retry_after=1.0)

    def _command(self, command: Callable[[], Update | None]) -> None:
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
            self._post(self._break, error_id)

    def _run_once(self) -> bool:
        with self._wake:
            while not (self._commands or self._stopping or self.engine.has_work):
                self._wake.wait()
            commands, self._commands = self._commands, []
            stopping = self._stopping
        updates = [update for command in commands if (update := command()) is not None]
        if stopping:
            return False
        if self.engine.has_work:
            updates += self.engine.step()
        if updates:
            self._post(self._deliver, updates)
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
            if stream is not None:
                stream.put(update)
                if update.finish is not None:
                    self._forget(update.request_id)

    def _forget(self, key: str) -> None:
        """The request has ended, read or not: its id and its place are free."""
        del self._keys[self._streams.pop(key).request_id]
        if not self._streams:
            self._idle.set()

    def _break(self, error_id: str) -> None:
        self._set_state(EngineState.BROKEN)
        self._fail_all(EngineFailure(error_id))

    def _fail_all(self, error: SparserveError) -> None:
        finish = Finish(FinishReason.ERROR, Timings(0, 0, 0, 0), 0, 0, error=error)
        self._deliver([Update(key, finish=finish) for key in self._streams])

    def _set_state(self, state: EngineState) -> None:
        if state is not self.state:
            self.state = state
            self._on_state(state)
