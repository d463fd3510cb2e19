"""GPUs as the library tells of them, by a library that is made up."""

import ctypes
import gc
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sparse_kernels import native
from sparse_kernels._abi import sk_status
from sparse_kernels.decoder import Decoder
from sparse_kernels.device import Device, describe, devices, parse, usable
from sparse_kernels.kv_memory import DeviceMemory, HostMemory, new_kv_memory
from sparse_kernels.native import DeviceLost, NativeCallError


class FakeLibrary:
    """Two GPUs, the second without code, whose memory is the machine's own."""

    def __init__(self) -> None:
        self.count, self.capability, self.error, self.text = 2, 90, 0, b""
        self.loaded: list[tuple[int, bytes]] = []
        self.memory: dict[int, ctypes.Array] = {}

    def sk_last_error(self) -> bytes:
        return self.text

    def sk_device_count(self, count) -> int:
        count._obj.value = self.count
        return self.error

    def sk_device_describe(self, index, info) -> int:
        info = info._obj
        info.total_bytes, info.free_bytes = 8 << 30, 5 << 30
        info.capability, info.multiprocessors, info.driver = self.capability, 132, 13000
        info.coded = int(index == 0 or any(own == index for own, _ in self.loaded))
        name = b"NVIDIA H200\0 of another time"
        ctypes.memmove(info.name, name, len(name))
        return self.error

    def sk_device_load(self, index, image, size) -> int:
        assert len(image) == size
        self.loaded.append((index, image))
        return self.error

    def sk_device_allocate(self, index, size, address) -> int:
        memory = ctypes.create_string_buffer(size)
        if not self.error:
            address._obj.value = ctypes.addressof(memory)
            self.memory[ctypes.addressof(memory)] = memory
        return self.error

    def sk_device_free(self, index, address) -> int:
        del self.memory[address]
        return 0

    def sk_device_read(self, index, to, address, size) -> int:
        ctypes.memmove(to, address, size)
        return self.error

    def sk_device_write(self, index, address, source, size) -> int:
        ctypes.memmove(address, source, size)
        return self.error


@pytest.fixture
def library(monkeypatch) -> FakeLibrary:
    made = FakeLibrary()
    monkeypatch.setattr(native, "load", lambda kind="cpu": made)
    return made


def test_places():
    assert [parse(p) for p in ("cpu", "cuda", "cuda:0", "cuda:12", "emulator")] == [
        ("cpu", 0), ("cuda", 0), ("cuda", 0), ("cuda", 12), ("emulator", 0)
    ]  # fmt: skip
    for wrong in ("", "gpu", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "cuda:²", "CUDA"):
        with pytest.raises(NativeCallError, match="it can be cpu, cuda or cuda:N"):
            parse(wrong)
    with pytest.raises(NativeCallError, match="device is 4294967296; it can be 0 to"):
        parse("cuda:4294967296")


def test_what_a_gpu_is(library):
    first, second = devices()
    assert first == describe("cuda") == describe("cuda:0")
    assert first == Device("cuda", 0, "NVIDIA H200", 8 << 30, 5 << 30, 90, 132, 13000, coded=True)
    assert (second.place, str(second)) == ("cuda:1", "cuda:1 NVIDIA H200")
    assert not second.coded


def test_a_gpu_that_is_not_there(library):
    with pytest.raises(NativeCallError, match="there is no cuda:2: there are only 2 GPUs") as told:
        describe("cuda:2")
    assert told.value.status == sk_status.SK_STATUS_UNSUPPORTED
    library.count = 1
    with pytest.raises(NativeCallError, match="there is no cuda:1: there is only 1 GPU"):
        describe("cuda:1")
    library.count, library.text = 0, b"libcuda.so.1 is not there"
    assert devices() == []
    with pytest.raises(NativeCallError, match=r"there is no cuda:0: libcuda\.so\.1 is not there"):
        describe("cuda")


def test_kernels_are_compiled_where_the_library_has_none(library, monkeypatch):
    compiler = SimpleNamespace(compile_kernels=lambda capability: b"code of %d" % capability)
    monkeypatch.setitem(sys.modules, "sparse_kernels.cuda_code", compiler)
    usable("cuda:0")
    assert library.loaded == []
    for _ in range(2):
        usable("cuda:1")
    assert library.loaded == [(1, b"code of 90")]


def test_a_gpu_that_is_too_old(library):
    library.capability = 75
    with pytest.raises(NativeCallError, match=r"cuda:0 NVIDIA H200 has .* 7\.5; .* need 8\.0"):
        usable("cuda:0")


def test_a_lost_gpu_is_told_apart(library):
    library.error, library.text = sk_status.SK_STATUS_DEVICE, b"GPU 0 failed"
    with pytest.raises(DeviceLost, match="GPU 0 failed") as told:
        devices()
    assert told.value.status == sk_status.SK_STATUS_DEVICE


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_memory_is_read_and_written_in_bytes(library, device):
    memory = new_kv_memory(device, 1000)
    assert isinstance(memory, HostMemory if device == "cpu" else DeviceMemory)
    assert (memory.device, memory.nbytes) == (device, 1000)
    assert not memory.read(0, 1000).any()
    values = torch.arange(40, dtype=torch.int16).view(5, 8)
    memory.write(100, values[:, ::2])
    assert torch.equal(memory.read(100, 40).view(torch.int16).view(5, 4), values[:, ::2])
    assert not memory.read(0, 100).any()
    assert not memory.read(140, 860).any()
    read = memory.read(100, 40)
    memory.write(100, torch.zeros(40, dtype=torch.uint8))
    assert torch.equal(read.view(torch.int16).view(5, 4), values[:, ::2]), "a copy"
    for offset, size in ((-1, 2), (999, 2), (0, 1001)):
        with pytest.raises(ValueError, match=f"bytes {offset} to {offset + size} are not within"):
            memory.read(offset, size)
        with pytest.raises(ValueError, match="are not within 1000"):
            memory.write(offset, torch.zeros(size, dtype=torch.uint8))


def test_memory_of_a_gpu_goes_with_its_object(library):
    memory = new_kv_memory("cuda:0", 64)
    assert list(library.memory) == [memory.data_ptr()]
    del memory
    gc.collect()
    assert library.memory == {}


def test_memory_that_a_gpu_has_not(library):
    library.error = sk_status.SK_STATUS_OUT_OF_MEMORY
    library.text = b"64 bytes are wanted, 5 are free"
    with pytest.raises(NativeCallError, match="64 bytes are wanted") as told:
        new_kv_memory("cuda:0", 64)
    assert told.value.status == sk_status.SK_STATUS_OUT_OF_MEMORY


def test_a_scan_is_refused_on_a_gpu(library, tiny_decoder):
    packed = replace(tiny_decoder().packed(), scan=object())
    with pytest.raises(NativeCallError, match=r"has a scan \(int4\+exact\), .* not for cuda:0"):
        Decoder(packed, device="cuda:0")


def test_the_emulator_stands_in_for_a_gpu_where_the_environment_says_so(monkeypatch, tmp_path):
    own = tmp_path / "libown.so"
    own.write_text("text")
    monkeypatch.setenv(native.EMULATED, str(own))
    for kind in ("cuda", "emulator"):
        with pytest.raises(native.NativeLibraryError, match=f"{own} cannot be loaded"):
            native.load(kind)
    native.load("cpu")


def test_a_gpu_needs_no_packed_weights_any_more(levels, tiny_decoder, make_machine):
    arenas, tiny = [], tiny_decoder()

    class Watched:
        config = tiny.config

        def packed(self):
            packed = tiny.packed()
            arenas.append(weakref.ref(packed.arena))
            return packed

    machine = make_machine(Watched(), isa=levels[-1])
    gc.collect()
    on_gpu = machine.decoder.device != "cpu"
    assert (arenas[0]() is None) == on_gpu
    assert (machine.decoder.device_bytes > 0) == on_gpu
