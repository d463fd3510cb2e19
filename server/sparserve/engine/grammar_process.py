"""The server's side of the compiling process: started when first needed, killed when late."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from contextlib import suppress

from sparserve.engine import grammar_worker
from sparserve.engine.constraint import Constraint
from sparserve.errors import InvalidRequest, Unavailable

START_SECONDS = 60.0


class GrammarProcess:
    """Not thread-safe, but that `close` may come from another thread at any time."""

    def __init__(
        self,
        vocabulary: list[bytes],
        eos_token_ids: list[int],
        timeout_seconds: float,
        max_memory_bytes: int,
    ) -> None:
        """`vocabulary`: the bytes of each token id; none where the token must not appear."""
        self._setup = json.dumps(
            {
                "vocabulary": [token.decode("latin-1") for token in vocabulary],
                "vocab_size": len(vocabulary),
                "eos_token_ids": eos_token_ids,
                "timeout_seconds": timeout_seconds,
                "max_memory_bytes": max_memory_bytes,
            }
        ).encode()
        self._timeout_seconds = timeout_seconds
        self._max_memory_bytes = max_memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # over `_process` and `_closed`
        self._closed = False

    def compile(self, constraint: Constraint) -> str:
        """The compiled grammar as xgrammar's JSON; blocks for `timeout_seconds` at most, and for the
        start of the process where it is not running.

        Raises InvalidRequest where the constraint cannot be compiled, Unavailable where the process
        does not start or this is closed.
        """
        process = self._process
        if process is None or process.poll() is not None:  # the system may have killed it, idle
            process = self._start()
        request = {"kind": constraint.kind.value, "source": constraint.source}
        answer, late = _ask(process, json.dumps(request).encode(), self._timeout_seconds)
        if answer is None:
            status = self._end()
            raise self._death(constraint, status, late)
        outcome, body = answer[:1], answer[1:].decode()
        if outcome == grammar_worker.COMPILED:
            return body
        if outcome == grammar_worker.OUT_OF_MEMORY:
            self._end()  # its heap is full of what failed
            body = f"it needs more than {self._max_memory_bytes} bytes to compile; simplify it"
        raise refusal(constraint, body)

    def close(self) -> None:
        """End the process; a compilation in progress fails."""
        with self._lock:
            self._closed = True
        self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        self._end()
        with self._lock:
            if self._closed:
                raise Unavailable("the server is stopping")
            # -P: a file in the working directory must not pass for a library. A session of its own:
            # a terminal's Ctrl-C is for the server, which then ends this one.
            process = self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", grammar_worker.__name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        answer, _ = _ask(process, self._setup, START_SECONDS)
        if answer is None:
            status = self._end()
            if self._closed:
                raise Unavailable("the server is stopping")
            raise Unavailable(f"the grammar compiler did not start, exit status {status}")
        return process

    def _end(self) -> int | None:
        """Kill the process, if any. -> its exit status as Popen tells it."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        status = process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what could not be written to it any more
                pipe.close()
        return status

    def _death(self, constraint: Constraint, status: int | None, late: bool) -> Exception:
        if self._closed:
            return Unavailable("the server is stopping")
        if late:
            body = f"it takes more than {self._timeout_seconds:g} s to compile; simplify it"
            return refusal(constraint, body)
        how = signal.Signals(-status).name if status and status < 0 else f"exit status {status}"
        return refusal(constraint, f"the compiler failed on it ({how}); simplify it")


def refusal(constraint: Constraint, why: str) -> InvalidRequest:
    """The error of a constraint that cannot be served; `why` speaks of it as "it"."""
    name = constraint.kind.value
    return InvalidRequest(f"constraint.{name}", f"cannot use this {name}: {why}")


def _ask(
    process: subprocess.Popen[bytes], frame: bytes, seconds: float
) -> tuple[bytes | None, bool]:
    """-> (the answer, or None where the process is gone; whether it was killed as late)."""
    assert process.stdin is not None
    assert process.stdout is not None
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        grammar_worker.write_frame(process.stdin, frame)
        answer = grammar_worker.read_frame(process.stdout)
    except OSError:
        answer = None
    finally:
        timer.cancel()
        timer.join()  # it may be killing just now
    return (None if late.is_set() else answer), late.is_set()
