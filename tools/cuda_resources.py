"""What each CUDA kernel takes of a multiprocessor: docs/benchmarks/cuda-kernels.json, and a table.

Needs nvcc, no GPU. Run it after a change of a kernel: python tools/cuda_resources.py
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "sparse_kernels" / "cuda" / "kernels.cu"
OUTPUT = ROOT / "docs" / "benchmarks" / "cuda-kernels.json"

THREADS = 256  # kThreads of arguments.hpp
REGISTERS = 65536  # of a multiprocessor; a warp gets them in pieces of 256
PIECE = 256
BLOCK_SHARED = 1024  # shared memory that CUDA itself takes for a block
# CUDA C++ Programming Guide, "Technical specifications per compute capability": threads and bytes
# of shared memory of a multiprocessor.
LIMITS = {80: (2048, 164 << 10), 89: (1536, 100 << 10), 90: (2048, 228 << 10)}
ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\d+)'\n"
    r".*\n.* (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?"
)


@dataclass(frozen=True)
class Resources:
    kernel: str
    arch: int
    registers: int
    """Of a thread."""
    shared_bytes: int
    """Of a block."""
    spill_bytes: int
    """Stored and loaded, of a thread."""
    blocks_per_multiprocessor: int


def blocks_per_multiprocessor(arch: int, registers: int, shared_bytes: int) -> int:
    threads, shared = LIMITS[arch]
    of_warp = -(-registers * 32 // PIECE) * PIECE
    by_registers = REGISTERS // of_warp // (THREADS // 32)
    return min(by_registers, threads // THREADS, shared // (shared_bytes + BLOCK_SHARED))


def compile_for(nvcc: str, arch: int) -> list[Resources]:
    """As the build compiles (cmake/cuda_image.cmake)."""
    flags = ["-std=c++17", "-O3", "--fmad=false", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v"]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *flags, KERNELS, "-o", Path(folder) / "kernels.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return [_resources(found) for found in ENTRY.finditer(done.stderr)]


def _resources(found: re.Match[str]) -> Resources:
    arch, registers = int(found["arch"]), int(found["registers"])
    shared, spill = int(found["shared"] or 0), int(found["stores"]) + int(found["loads"])
    blocks = blocks_per_multiprocessor(arch, registers, shared)
    return Resources(found["kernel"], arch, registers, shared, spill, blocks)


def show(all_resources: list[Resources]) -> None:
    columns = "registers", "shared bytes", "spill bytes", "blocks"
    table = Table("kernel", "sm", title="CUDA kernels, blocks of a multiprocessor")
    for column in columns:
        table.add_column(column, justify="right")
    for own in all_resources:
        table.add_row(*map(str, asdict(own).values()))
    Console().print(table)


def main() -> None:
    if (nvcc := shutil.which("nvcc")) is None:
        sys.exit("nvcc is not on the PATH; install CUDA's toolkit, 12.0 or newer")
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"V(\d[\d.]+)", told)
    with ThreadPoolExecutor(2) as pool:
        compiled = pool.map(lambda arch: compile_for(nvcc, arch), LIMITS)
        found = sorted(
            (own for of_arch in compiled for own in of_arch), key=lambda own: (own.kernel, own.arch)
        )
    show(found)
    result = {
        "nvcc": version[1] if version else told.strip(),
        "threads_of_block": THREADS,
        "kernels": [asdict(own) for own in found],
    }
    OUTPUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
