"""Where a decoder's KV is: in main memory or in that of a GPU."""

from __future__ import annotations

import ctypes
import weakref
from typing import Protocol

import torch

from sparse_kernels import native
from sparse_kernels.arena import huge_pages
from sparse_kernels.device import parse


class KvMemory(Protocol):
    """Zeroed bytes that a decoder of the same `device` writes KV into.

    Offsets are bytes; what `read` returns is a copy. Both raise ValueError of what lies outside.
    """

    @property
    def device(self) -> str:
        """cpu, cuda:0, …"""
        ...

    @property
    def nbytes(self) -> int: ...

    def data_ptr(self) -> int: ...

    def read(self, offset: int, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8."""
        ...

    def write(self, offset: int, data: torch.Tensor) -> None:
        """Of any dtype and shape."""
        ...


def new_kv_memory(device: str, nbytes: int) -> KvMemory:
    """Raises MemoryError; of a GPU's NativeCallError (SK_STATUS_OUT_OF_MEMORY)."""
    kind, index = parse(device)
    return HostMemory(nbytes) if kind == "cpu" else DeviceMemory(kind, index, nbytes)


class HostMemory:
    """Main memory, on huge pages."""

    device = "cpu"

    def __init__(self, nbytes: int) -> None:
        """Raises MemoryError."""
        self._bytes = huge_pages(nbytes)

    @property
    def nbytes(self) -> int:
        return len(self._bytes)

    def data_ptr(self) -> int:
        return self._bytes.data_ptr()

    def read(self, offset: int, nbytes: int) -> torch.Tensor:
        _check(self, offset, nbytes)
        return self._bytes[offset : offset + nbytes].clone()

    def write(self, offset: int, data: torch.Tensor) -> None:
        _check(self, offset, data.nbytes)
        self._bytes[offset : offset + data.nbytes] = as_bytes(data)


class DeviceMemory:
    """A GPU's."""

    def __init__(self, kind: str, index: int, nbytes: int) -> None:
        """Raises NativeCallError."""
        self.device = f"{kind}:{index}"
        self.nbytes = native.unsigned("nbytes", nbytes)
        self._index, self._library = index, native.load(kind)
        address = ctypes.c_uint64()
        status = self._library.sk_device_allocate(index, nbytes, ctypes.byref(address))
        native.check(self._library, status)
        self._address = address.value
        weakref.finalize(self, self._library.sk_device_free, index, self._address)

    def data_ptr(self) -> int:
        return self._address

    def read(self, offset: int, nbytes: int) -> torch.Tensor:
        _check(self, offset, nbytes)
        data = torch.empty(nbytes, dtype=torch.uint8)
        status = self._library.sk_device_read(
            self._index, data.data_ptr(), self._address + offset, nbytes
        )
        native.check(self._library, status)
        return data

    def write(self, offset: int, data: torch.Tensor) -> None:
        _check(self, offset, data.nbytes)
        data = as_bytes(data)
        status = self._library.sk_device_write(
            self._index, self._address + offset, data.data_ptr(), data.nbytes
        )
        native.check(self._library, status)


def as_bytes(data: torch.Tensor) -> torch.Tensor:
    """[bytes] uint8, contiguous."""
    return data.contiguous().view(-1).view(torch.uint8)


def _check(memory: KvMemory, offset: int, nbytes: int) -> None:
    if not 0 <= offset <= offset + nbytes <= memory.nbytes:
        raise ValueError(f"bytes {offset} to {offset + nbytes} are not within {memory.nbytes}")
