"""The machine that a report speaks of."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

from sparse_kernels.device import devices
from sparse_kernels.native import NativeCallError, NativeLibraryError, usable_cpus
from sparserve.errors import ConfigError


def describe_machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if "model name" in line
        ]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    return ", ".join([cpu, *_gpus(), platform.system()])


def _gpus() -> list[str]:
    try:
        return [gpu.name for gpu in devices()]
    except (NativeLibraryError, NativeCallError):
        return []


class CpuWatch:
    """How many CPUs other processes, and other guests of the host, have used since it was made.

    What waits at barriers, as every system here does, loses far more than the share that they take.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def others(self) -> float:
        wall, busy, own = (b - a for a, b in zip(self._start, self._now(), strict=True))
        return max(0.0, (busy - own) / wall)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return time.monotonic(), _busy_seconds(Path("/proc/stat").read_text()), time.process_time()


def _busy_seconds(stat: str) -> float:
    """CPU time of the whole machine in /proc/stat: user, nice, system, irq, softirq and steal."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def check_threads(threads: int) -> None:
    """Raises ConfigError where `threads` would have to wait for each other; 0 are all usable ones."""
    if threads > (cpus := usable_cpus()):
        raise ConfigError(
            f"--threads {threads} is more than the {cpus} CPUs that this process can use: threads that "
            "wait for each other measure nothing"
        )
