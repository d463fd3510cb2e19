"""GPUs, as the library for them sees them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from sparse_kernels import _abi, native

# Of the GPUs that there are kernels for: 80 is 8.0, Ampere.
MIN_CAPABILITY = 80


@dataclass(frozen=True)
class Device:
    """A GPU, as it is now."""

    kind: str
    """cuda, or emulator."""
    index: int
    name: str
    total_bytes: int
    free_bytes: int
    capability: int
    """90 for 9.0."""
    multiprocessors: int
    driver: int
    """The newest CUDA that its driver knows, 13000 for 13.0."""
    coded: bool
    """Whether the library has kernels for it."""

    @property
    def place(self) -> str:
        """As in settings: cuda:0."""
        return f"{self.kind}:{self.index}"

    def __str__(self) -> str:
        return f"{self.place} {self.name}"


def parse(place: str) -> tuple[str, int]:
    """The kind and the number of "cpu", "cuda", "cuda:1", "emulator"; the first where none is named.

    Raises NativeCallError.
    """
    kind, colon, number = place.partition(":")
    known = kind in native.LIBRARIES and not (kind == "cpu" and colon)
    if not known or (colon and not (number.isascii() and number.isdecimal())):
        raise native.NativeCallError(
            _abi.sk_status.SK_STATUS_BAD_VALUE,
            f"device is {place!r}; it can be cpu, cuda or cuda:N, with N the number of a GPU",
        )
    return kind, native.unsigned("device", int(number or 0), bits=32)


def devices(kind: str = "cuda") -> list[Device]:
    """Return all GPUs; [] where there is no driver or no GPU. Raises NativeLibraryError."""
    library = native.load(kind)
    return [describe(f"{kind}:{index}") for index in range(_count(library))]


def describe(place: str) -> Device:
    """Return the GPU at `place`, such as cuda:0.

    Raises NativeLibraryError, and NativeCallError (SK_STATUS_UNSUPPORTED) where there is none.
    """
    kind, index = parse(place)
    library = native.load(kind)
    count = _count(library)
    if index >= count:
        # Where there is none at all the library says why: no driver, or one that it cannot use.
        why = library.sk_last_error().decode()
        if count:
            why = "there is only 1 GPU" if count == 1 else f"there are only {count} GPUs"
        raise _unsupported(f"there is no {kind}:{index}: {why or 'no GPU was found'}")
    info = native.new_struct(_abi.sk_device_info)
    native.check(library, library.sk_device_describe(index, ctypes.byref(info)))
    return Device(
        kind=kind,
        index=index,
        name=bytes(info.name).split(b"\0")[0].decode(errors="replace"),
        total_bytes=info.total_bytes,
        free_bytes=info.free_bytes,
        capability=info.capability,
        multiprocessors=info.multiprocessors,
        driver=info.driver,
        coded=bool(info.coded),
    )


def usable(place: str) -> Device:
    """Return the GPU at `place`, whose kernels are there or were just compiled.

    Raises as `describe` and NativeCallError (SK_STATUS_UNSUPPORTED) of a GPU that is too old.
    """
    device = describe(place)
    if device.capability < MIN_CAPABILITY:
        raise _unsupported(
            f"{device} has compute capability {_version(device.capability, 10)}; the kernels need "
            f"{_version(MIN_CAPABILITY, 10)} or newer"
        )
    if not device.coded:
        _load_code(device)
    return device


def _load_code(device: Device) -> None:
    """Compile the kernels for it: the library was built without a CUDA compiler."""
    from sparse_kernels.cuda_code import compile_kernels  # what it needs is an extra

    library, image = native.load(device.kind), compile_kernels(device.capability)
    native.check(library, library.sk_device_load(device.index, image, len(image)))


def _count(library: ctypes.CDLL) -> int:
    count = ctypes.c_uint32()
    native.check(library, library.sk_device_count(ctypes.byref(count)))
    return count.value


def _version(number: int, unit: int) -> str:
    return f"{number // unit}.{number % unit}"


def _unsupported(message: str) -> native.NativeCallError:
    return native.NativeCallError(_abi.sk_status.SK_STATUS_UNSUPPORTED, message)
