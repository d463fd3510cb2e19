"""The compiled libraries, called through their one C ABI: one computes on the CPU, one on a GPU.

A library is loaded at the first call, not at import. `_abi.py` mirrors its header and is generated
from it; the functions here fill the structs, turn a status into an exception and give results
names. Sizes are bytes, times seconds, rates GB/s = 1e9 bytes a second. ctypes lets go of the GIL
for the time of a call.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import sparse_kernels
from sparse_kernels import _abi

# By the kind of device that it computes on. The emulator runs a GPU's kernels on the CPU, for tests.
LIBRARIES = {
    "cpu": "libsparse_kernels_cpu.so",
    "cuda": "libsparse_kernels_cuda.so",
    "emulator": "libsparse_kernels_emulated.so",
}
# In the environment, the path of the emulator's library: it then stands in for that of the GPU too.
EMULATED = "SPARSE_KERNELS_EMULATED"
DEFAULT_PROBE_BYTES = 1 << 30
REINSTALL = "Install the package again (pip install . in its source tree, or pip install sparserve)"

AnyStruct = TypeVar("AnyStruct", bound=ctypes.Structure)


class NativeLibraryError(RuntimeError):
    """The compiled library is missing, cannot be loaded, or belongs to another version."""


class NativeCallError(RuntimeError):
    """A native function refused its arguments or failed.

    `status` says which kind of failure; the message names the value and its limit.
    """

    def __init__(self, status: _abi.sk_status, message: str) -> None:
        super().__init__(message)
        self.status = status


class DeviceLost(NativeCallError):
    """The GPU failed: nothing on it can be used any more, not even by a new model."""


@dataclass(frozen=True)
class CpuFeatures:
    """What the CPU offers and which level of kernels is in use."""

    isa: str
    """Level in use: portable, avx2, avx512 or amx; `SPARSE_KERNELS_ISA` forces one."""
    highest_isa: str
    """Highest level that this CPU runs."""
    flags: frozenset[str]
    """Of avx2, fma, f16c, avx512f, avx512bw, avx512dq, avx512vl, avx512vnni, avx512bf16, amx_int8,
    amx_bf16, avx512vbmi2."""


@dataclass(frozen=True)
class ReadProbe:
    """The speed at which some threads together read memory."""

    gb_per_s: float
    """Median over the passes."""
    best_gb_per_s: float
    """Of the fastest pass."""
    bytes_read: int
    seconds: float
    """Time of all passes."""
    setup_seconds: float
    """Time before the first pass, on filling the buffer."""
    passes: int
    buffer_bytes: int
    """Really cycled over: what was asked for, rounded down to equal shares of 64 KiB blocks."""
    threads: int
    isa: str
    pinned: bool
    """Whether each thread had a CPU of its own."""
    huge_pages: bool
    """Whether the kernel took the advice to use huge pages; without them reading is slower."""


def load(kind: str = "cpu") -> ctypes.CDLL:
    """Return the library for a kind of device (cpu, cuda, emulator), loaded once per process.

    Raises NativeLibraryError with the way out if it is missing or of another version.
    """
    if kind != "cpu" and (emulated := os.environ.get(EMULATED)):
        return _load(Path(emulated))
    return _load(_find_library(LIBRARIES[kind]))


def cpu_features() -> CpuFeatures:
    """Return the instruction sets of this CPU and the level that the kernels use.

    Raises NativeLibraryError; NativeCallError if `SPARSE_KERNELS_ISA` names an unknown level
    (SK_STATUS_BAD_VALUE) or one that this CPU lacks (SK_STATUS_UNSUPPORTED).
    """
    library = load()
    info = new_struct(_abi.sk_cpu_info)
    check(library, library.sk_cpu_features(ctypes.byref(info)))
    flags = {f.name.removeprefix("SK_CPU_").lower() for f in _abi.sk_cpu_flag if f & info.flags}
    return CpuFeatures(isa_name(info.isa), isa_name(info.highest_isa), frozenset(flags))


def read_probe(
    buffer_bytes: int | None = None,
    threads: int | None = None,
    seconds: float = 0.5,
    *,
    isa: str = "auto",
) -> ReadProbe:
    """Measure how fast memory can be read: the ceiling of every kernel that streams weights.

    Args:
        buffer_bytes: the threads cycle over a buffer of this size. Below the size of the last-level
            cache this measures the cache, so give what the compared kernel reads. None: 1 GiB, or a
            quarter of the memory that this process can still get if that is less.
        threads: 1 to 1024; None: `usable_cpus()`.
        seconds: of reading, above 0 and at most 600. Filling the buffer comes before it, of the
            order of 0.2 s a GiB.
        isa: portable, avx2, avx512 or amx; auto: the level in use.

    Raises:
        NativeCallError: a value outside its limits, more memory than there is, a level that the
            CPU lacks.
        NativeLibraryError: no library.
    """
    library = load()
    room = memory_room()
    if buffer_bytes is None:
        buffer_bytes = min(DEFAULT_PROBE_BYTES, room // 4)
    elif buffer_bytes > room:
        # Past a cgroup's limit the kernel kills the process instead of refusing the memory.
        raise NativeCallError(
            _abi.sk_status.SK_STATUS_OUT_OF_MEMORY,
            f"buffer_bytes is {buffer_bytes}, but this process can get only {room} bytes more",
        )
    arguments = new_struct(_abi.sk_read_probe_args)
    arguments.buffer_bytes = unsigned("buffer_bytes", buffer_bytes)
    arguments.threads = unsigned("threads", usable_cpus() if threads is None else threads, bits=32)
    arguments.seconds = seconds
    arguments.isa = isa_value(isa)
    result = new_struct(_abi.sk_read_probe_result)
    check(library, library.sk_read_probe(ctypes.byref(arguments), ctypes.byref(result)))
    return ReadProbe(
        gb_per_s=result.median_gb_per_s,
        best_gb_per_s=result.best_gb_per_s,
        bytes_read=result.bytes_read,
        seconds=result.seconds,
        setup_seconds=result.setup_seconds,
        passes=result.passes,
        buffer_bytes=result.buffer_bytes,
        threads=result.threads,
        isa=isa_name(result.isa),
        pinned=bool(result.pinned),
        huge_pages=bool(result.huge_pages),
    )


def usable_cpus() -> int:
    """Return how many CPUs this process can keep busy: affinity mask and cgroup quota, at least 1.

    A container's quota does not show in the affinity mask; with a thread for each CPU of the mask
    the kernel would stop all of them for a part of each period.
    """
    cpus = len(os.sched_getaffinity(0))
    for folder in _cgroup_folders("cpu"):
        if (limit := _read(folder / "cpu.max")) is not None:
            quota, _, period = limit.partition(" ")
        else:
            quota = _read(folder / "cpu.cfs_quota_us") or "max"
            period = _read(folder / "cpu.cfs_period_us") or "100000"
        if quota not in ("max", "-1"):
            cpus = min(cpus, math.ceil(int(quota) / int(period)))
    return max(1, cpus)


def memory_room() -> int:
    """Return how many bytes this process can still get: of the machine and of its cgroups."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    room = int(meminfo["MemAvailable"].split()[0]) * 1024
    for folder in _cgroup_folders("memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if limit in (None, "max") or used is None:
            continue
        # The page cache counts as used, but its inactive part gives way. v1 counts a folder's
        # children under total_*.
        stat = dict(line.split() for line in (_read(folder / "memory.stat") or "").splitlines())
        cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
        room = min(room, int(limit) - int(used) + cache)
    return max(0, room)


def new_struct(struct: type[AnyStruct]) -> AnyStruct:
    """Return a zeroed struct of the ABI with its two head fields set."""
    return struct(abi_version=_abi.SK_ABI_VERSION, struct_size=ctypes.sizeof(struct))


def check(library: ctypes.CDLL, status: int) -> None:
    """Raise NativeCallError, or DeviceLost, unless `status`, just returned on this thread, is
    SK_STATUS_OK."""
    if status != _abi.sk_status.SK_STATUS_OK:
        lost = status == _abi.sk_status.SK_STATUS_DEVICE
        kind = DeviceLost if lost else NativeCallError
        raise kind(_abi.sk_status(status), library.sk_last_error().decode())


def _find_library(name: str) -> Path:
    # An editable install has two entries: the source tree and the folder of the built library.
    folders = [Path(entry) for entry in sparse_kernels.__path__]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    searched = ", ".join(map(str, folders))
    hint = ""
    if (folders[0] / "cpu").is_dir():
        hint = (
            " This is a source tree, which Python found before any installed package: run from "
            "another folder, or use an editable install (pip install -e .)."
        )
    raise NativeLibraryError(f"{name} is not in {searched}. {REINSTALL}.{hint}")


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        _abi.declare_functions(library)
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(f"{path} cannot be loaded: {error}. {REINSTALL}.") from error
    version = library.sk_abi_version()
    if version != _abi.SK_ABI_VERSION:
        raise NativeLibraryError(
            f"{path} has ABI version {version}, this package needs {_abi.SK_ABI_VERSION}. "
            f"{REINSTALL}."
        )
    return library


def isa_name(value: int) -> str:
    """Of an sk_isa: auto, portable, avx2, avx512, amx or cuda."""
    return _abi.sk_isa(value).name.removeprefix("SK_ISA_").lower()


def isa_value(name: str) -> int:
    """The sk_isa of that name. Raises NativeCallError."""
    values = {isa_name(value): int(value) for value in _abi.sk_isa}
    if name not in values:
        raise NativeCallError(
            _abi.sk_status.SK_STATUS_BAD_VALUE, f"isa is {name!r}; it can be {', '.join(values)}"
        )
    return values[name]


def unsigned(name: str, value: int, bits: int = 64) -> int:
    """`value`, which a field can hold: ctypes would cut it down to its low bits without a word.

    Raises NativeCallError.
    """
    if not 0 <= value < 1 << bits:
        raise NativeCallError(
            _abi.sk_status.SK_STATUS_BAD_SIZE,
            f"{name} is {value}; it can be 0 to {(1 << bits) - 1}",
        )
    return value


def _cgroup_folders(controller: str, proc: Path = Path("/proc/self")) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and its parents, of the v2 or v1 hierarchy.

    Inside a container the path in /proc/self/cgroup may lie outside what is mounted; then only the
    mount's root is yielded, which is the container's own group.
    """
    paths: dict[str, str] = {}
    for line in (_read(proc / "cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in (_read(proc / "mountinfo") or "").splitlines():
        head, _, tail = line.partition(" - ")
        root, mount_point = head.split()[3:5]
        kind, _, options = tail.split(" ", 2)
        if kind == "cgroup2" and "" in paths:
            path = paths[""]
        elif kind == "cgroup" and controller in options.split(",") and controller in paths:
            path = paths[controller]
        else:
            continue
        mount = Path(mount_point)
        folder = mount / os.path.relpath(path, root)
        if ".." in folder.parts or not folder.is_dir():
            folder = mount
        yield folder
        yield from (parent for parent in folder.parents if mount in (parent, *parent.parents))


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
