"""The machine that a report speaks of."""

from __future__ import annotations

import platform
from pathlib import Path

from sparse_kernels.native import usable_cpus
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
    return f"{cpu}, {platform.system()}"


def check_threads(threads: int) -> None:
    """Raises ConfigError where `threads` would have to wait for each other; 0 are all usable ones."""
    if threads > (cpus := usable_cpus()):
        raise ConfigError(
            f"--threads {threads} is more than the {cpus} CPUs that this process can use: threads that "
            "wait for each other measure nothing"
        )
