"""What a run costs beside its answers: the lateness of our own event loop, the server's CPU time and memory."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

from sparserve.bench.peers.packages import require
from sparserve.bench.serve.records import Usage
from sparserve.errors import ConfigError

LOOK = 0.02  # seconds between two looks at the event loop
MEMORY_LOOK = 1.0  # between two at the server's memory
FAMILY_LOOKS = 10  # of those, between two at what it has started, which reads all of /proc


class LoopWatch:
    """How late the event loop wakes what should run now: all that it times is as late at most."""

    def __init__(self) -> None:
        self.lags: list[float] = []

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            due = time.perf_counter() + LOOK
            await asyncio.sleep(LOOK)
            self.lags.append(max(0.0, time.perf_counter() - due))


class ProcessWatch:
    """CPU time and memory of processes with all that they started, together."""

    def __init__(self, pids: Sequence[int]) -> None:
        """Raises ConfigError of a process that there is not."""
        self._psutil = require("psutil")
        try:
            self._processes = [self._psutil.Process(pid) for pid in pids]
        except self._psutil.Error as error:
            raise ConfigError(f"the server's process: {error}") from error
        self._find_family()
        self._begun = time.perf_counter()
        self._cpu = self._cpu_seconds()
        self._rss = [(0.0, self._resident())]

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(MEMORY_LOOK)
            if len(self._rss) % FAMILY_LOOKS == 0:
                self._find_family()
            self._rss.append((round(time.perf_counter() - self._begun, 3), self._resident()))

    def usage(self) -> Usage:
        return Usage(round(self._cpu_seconds() - self._cpu, 3), self._rss)

    def _find_family(self) -> None:
        found: dict[int, Any] = {}
        for process in self._processes:
            with contextlib.suppress(self._psutil.Error):
                found |= {p.pid: p for p in (process, *process.children(recursive=True))}
        self._family = list(found.values())

    def _cpu_seconds(self) -> float:
        total = 0.0
        for process in self._family:
            with contextlib.suppress(self._psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _resident(self) -> int:
        total = 0
        for process in self._family:
            with contextlib.suppress(self._psutil.Error):
                total += process.memory_info().rss
        return total
