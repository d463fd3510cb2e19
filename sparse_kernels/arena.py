"""Zeroed memory on huge pages, as torch tensors."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch

from sparse_kernels._abi import SK_ALIGNMENT
from sparse_kernels.native import memory_room

HUGE_PAGE_BYTES = 2 << 20


def huge_pages(size: int) -> torch.Tensor:
    """`size` zeroed bytes [size] uint8 at an address that is a multiple of 2 MiB.

    They cost nothing until they are written to, and go back to the system with the last tensor that
    views them. Where the kernel knows no huge pages these are ordinary ones. Raises MemoryError.
    """
    if size > (room := memory_room()):
        # Past a cgroup's limit the kernel kills the process instead of refusing the memory.
        raise MemoryError(f"{size} bytes are needed, but this process can get only {room} more")
    try:
        # Private: Python's default is shared memory, which gets no huge pages.
        buffer = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size} bytes cannot be mapped: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            buffer.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(buffer, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE_PAGE_BYTES
    return whole[begin : begin + size]


class Arena:
    """One piece of such memory, handed out from its beginning on."""

    def __init__(self, size: int) -> None:
        self._memory = huge_pages(size)
        self._used = 0

    @property
    def size(self) -> int:
        return len(self._memory)

    def take(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """The next `size` bytes as a flat zeroed tensor of `dtype`, at a multiple of SK_ALIGNMENT."""
        begin, self._used = self._used, self._used + aligned(size)
        if self._used > len(self._memory):
            raise MemoryError(f"an arena of {len(self._memory)} bytes has no room for {size} more")
        return self._memory[begin : begin + size].view(dtype)


def aligned(size: int, unit: int = SK_ALIGNMENT) -> int:
    """`size` rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


def trim_heap() -> None:
    """Give memory that was freed back to the system, where the C library (glibc) would keep it: after a
    model was loaded, that can be as much as its weights.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST = 1 << 25  # that glibc takes for the latter: larger blocks are mapped each time


def keep_freed_memory() -> None:
    """Where the C library is glibc, blocks up to 32 MiB that are freed stay with the process: where as many are
    wanted again at once, as by a step of training, their pages would otherwise be faulted in each time.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        tune(_M_MMAP_THRESHOLD, _LARGEST)
        tune(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        tune(_M_TOP_PAD, 1 << 26)
