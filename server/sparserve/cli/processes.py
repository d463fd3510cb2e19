"""Programs that a command runs beside itself: started, watched, started again, ended."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from rich.text import Text

from sparserve.cli.output import err, warn
from sparserve.errors import ChildFailed

# So many ends, each within so many seconds of its start, and a program is not started again.
MAX_QUICK_ENDS = 3
QUICK_SECONDS = 30.0
_READY_POLL_SECONDS = 0.1
_RESTART_SECONDS = 1.0
_MAX_LINE = 1 << 20  # bytes
_PR_SET_PDEATHSIG = 1


class Child:
    """A program whose output is shown line by line behind its name, and that ends with this process."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        is_ready: Callable[[], Awaitable[bool]],
        is_shown: Callable[[str], bool] = bool,
    ) -> None:
        """`is_shown` says of a line of output whether it is for the user; by default those that are not empty."""
        self.name = name
        self._command = command
        self._is_ready = is_ready
        self._is_shown = is_shown
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._was_ready = asyncio.Event()

    async def ready(self) -> None:
        """Returns once it is for the first time; `run` is running beside this."""
        await self._was_ready.wait()

    async def run(self) -> None:
        """Until `stop`: starts it again where it ends by itself. Raises ChildFailed where it was never ready, or
        ends again and again.
        """
        quick_ends = 0
        while not self._stopping:
            begun = time.monotonic()
            status = await self._run_once()
            if self._stopping:
                return
            if not self._was_ready.is_set():
                raise ChildFailed(f"{self.name} ended with status {status} before it was ready")
            quick = time.monotonic() - begun < QUICK_SECONDS
            quick_ends = quick_ends + 1 if quick else 0
            if quick_ends >= MAX_QUICK_ENDS:
                raise ChildFailed(
                    f"{self.name} ended {quick_ends} times within {QUICK_SECONDS:g} s of its start, the last "
                    f"time with status {status}"
                )
            warn(f"{self.name} ended with status {status}; starting it again")
            await asyncio.sleep(_RESTART_SECONDS)

    async def stop(self, patience: float) -> None:
        """SIGTERM, and after `patience` seconds SIGKILL."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        self._send(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), patience)
        except TimeoutError:
            warn(f"{self.name} has not ended within {patience:g} s: killing it")
            self.kill()

    def kill(self) -> None:
        self._stopping = True
        self._send(signal.SIGKILL)

    async def _run_once(self) -> int:
        """-> its exit status; negative: the signal that ended it."""
        process = self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=_MAX_LINE,
            # A terminal's Ctrl-C is for this process, which ends the others in order.
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        watch = asyncio.create_task(self._watch_ready())
        try:
            await self._relay(process)
            return await process.wait()
        finally:
            watch.cancel()

    async def _relay(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # longer than any line that is meant to be read
                continue
            if not line:
                return
            text = Text.from_ansi(line.decode(errors="replace").rstrip()).plain
            if self._is_shown(text):
                err.print(f"{self.name} | {text}", markup=False, highlight=False, soft_wrap=True)

    async def _watch_ready(self) -> None:
        while not await self._is_ready():
            await asyncio.sleep(_READY_POLL_SECONDS)
        if self._was_ready.is_set():
            err.print(f"{self.name} is ready again", markup=False)
        self._was_ready.set()

    def _send(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


def _end_with_parent() -> None:
    """In the new process: SIGTERM for it when the thread that started it is no more, however it ended."""
    libc: Any = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
