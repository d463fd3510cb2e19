"""The CUDA library with a driver that does what a test says: what it tells of GPUs that cannot be used."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# NVIDIA's driver as far as the library calls it; the environment says what it answers.
DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef unsigned long long Pointer;
typedef size_t Size;
static int told(const char* name, int usual) {
  const char* value = getenv(name);
  return value ? atoi(value) : usual;
}
int cuInit(unsigned flags) { return told("FAKE_INIT", 0); }
int cuDriverGetVersion(int* version) { *version = told("FAKE_VERSION", 13000); return 0; }
int cuGetErrorName(int error, const char** name) {
  static char text[32];
  snprintf(text, sizeof(text), "ERROR_%d", error);
  *name = text;
  return 0;
}
int cuGetErrorString(int error, const char** text) { *text = "what it means"; return 0; }
int cuDeviceGetCount(int* count) { *count = told("FAKE_COUNT", 1); return 0; }
int cuDeviceGet(int* device, int number) { *device = number; return 0; }
int cuDeviceGetName(char* name, int bytes, int device) { snprintf(name, bytes, "FAKE"); return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const int capability = told("FAKE_CAPABILITY", 90);
  *value = attribute == 16 ? 132 : attribute == 75 ? capability / 10 : capability % 10;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)1; return 0; }
int cuCtxPushCurrent_v2(void* context) { return 0; }
int cuCtxPopCurrent_v2(void** context) { return 0; }
int cuCtxSynchronize(void) { return told("FAKE_SYNCHRONIZE", 0); }
int cuMemGetInfo_v2(Size* free, Size* total) { *free = 1000; *total = 2000; return 0; }
int cuModuleLoadData(void** module, const void* image) { *module = (void*)2; return told("FAKE_LOAD", 0); }
int cuModuleGetFunction(void** function, void* module, const char* name) { *function = (void*)3; return 0; }
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** arguments, void** extra) {
  return 0;
}
int cuStreamBeginCapture_v2(void* stream, int mode) { return told("FAKE_BEGIN", 0); }
int cuStreamEndCapture(void* stream, void** graph) { *graph = (void*)5; return told("FAKE_END", 0); }
int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
  *executable = (void*)6;
  return told("FAKE_INSTANTIATE", 0);
}
int cuGraphLaunch(void* executable, void* stream) {
  return executable == (void*)6 ? told("FAKE_LAUNCH_GRAPH", 0) : 400;
}
int cuGraphDestroy(void* graph) { return graph == (void*)5 ? 0 : 400; }
int cuGraphExecDestroy(void* executable) { return executable == (void*)6 ? 0 : 400; }
int cuMemAlloc_v2(Pointer* memory, Size bytes) {
  if (bytes > told("FAKE_MEMORY", 1000)) return 2;
  *memory = (Pointer)aligned_alloc(256, (bytes + 255) / 256 * 256);
  return 0;
}
int cuMemFree_v2(Pointer memory) { free((void*)memory); return 0; }
int cuMemHostAlloc(void** memory, Size bytes, unsigned flags) { *memory = malloc(bytes); return 0; }
int cuMemFreeHost(void* memory) { free(memory); return 0; }
int cuMemsetD8_v2(Pointer memory, unsigned char value, Size bytes) {
  memset((void*)memory, value, bytes);
  return 0;
}
int cuMemsetD8Async(Pointer memory, unsigned char value, Size bytes, void* stream) {
  return cuMemsetD8_v2(memory, value, bytes);
}
int cuStreamCreate(void** stream, unsigned flags) { *stream = (void*)4; return 0; }
int cuStreamDestroy_v2(void* stream) { return 0; }
int cuStreamSynchronize(void* stream) { return 0; }
int cuMemcpyHtoDAsync_v2(Pointer to, const void* from, Size bytes, void* stream) {
  memcpy((void*)to, from, bytes);
  return 0;
}
int cuMemcpyDtoHAsync_v2(void* to, Pointer from, Size bytes, void* stream) {
  memcpy(to, (void*)from, bytes);
  return 0;
}
int cuMemcpy(Pointer to, Pointer from, Size bytes) { memcpy((void*)to, (void*)from, bytes); return 0; }
"""

# Prints what each call says, "fine" where it says nothing.
CALLS = """
import ctypes
from sparse_kernels import _abi, native

library = native.load("cuda")


def call(name, *arguments):
    status = getattr(library, name)(*arguments)
    print(f"{name}: {library.sk_last_error().decode() if status else 'fine'}")
    return status == 0


count, address = ctypes.c_uint32(), ctypes.c_uint64()
call("sk_device_count", ctypes.byref(count))
print(f"count {count.value}: {library.sk_last_error().decode()}")
info = native.new_struct(_abi.sk_device_info)
if call("sk_device_describe", 0, ctypes.byref(info)):
    print(f"capability {info.capability}, {info.free_bytes} of {info.total_bytes} free, coded {info.coded}")
call("sk_device_allocate", 0, 5000, ctypes.byref(address))
if call("sk_device_allocate", 0, 64, ctypes.byref(address)):
    put, got = ctypes.create_string_buffer(b"bits" * 4, 16), ctypes.create_string_buffer(16)
    if call("sk_device_write", 0, address, put, 16) and call("sk_device_read", 0, got, address, 16):
        print("the same" if got.raw == put.raw else "others")
    call("sk_device_load", 0, b"x", 1)
"""

WITHOUT_FAULT = ["the same", "capability 90, 1000 of 2000 free", "sk_device_load: fine"]
CASES = {
    "a GPU": ({}, WITHOUT_FAULT),
    "too little memory": ({}, ["5000 bytes of its memory are wanted, 1000 of 2000 are free"]),
    "an old driver": ({"FAKE_VERSION": "11040"}, ["count 0: ", "11.4"]),
    "a driver that does not start": ({"FAKE_INIT": "999"}, ["count 0: ", "ERROR_999"]),
    "no GPU": ({"FAKE_COUNT": "0"}, ["count 0: no GPU"]),
    "an old GPU": (
        {"FAKE_CAPABILITY": "75"},
        ["GPU 0, FAKE, has compute capability 7.5; 8.0 is needed", "coded 0"],
    ),
    "code that does not load": (
        {"FAKE_LOAD": "209"},
        [
            "coded 0",
            "sk_device_load: GPU 0, FAKE, of compute capability 9.0, whose driver knows CUDA 13.0, takes no kernels",
            "(ERROR_209): the code is for other GPUs or is damaged; install sparserve again",
        ],
    ),
    "code that the driver is too old for": (
        {"FAKE_LOAD": "222", "FAKE_VERSION": "12020"},
        ["coded 0", "knows CUDA 12.2, takes no kernels", "(ERROR_222): ", "install a newer driver"],
    ),
    "code that does not load for another reason": (
        {"FAKE_LOAD": "304"},
        ["coded 0", "sk_device_load: GPU 0, FAKE: its driver knows", "ERROR_304"],
    ),
    "a GPU that fails": (
        {"FAKE_SYNCHRONIZE": "700"},
        [
            "sk_device_write: GPU 0, FAKE, failed: ",
            "ERROR_700",
            "sk_device_load: GPU 0, FAKE, failed: ",
        ],
    ),
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    command = [compiler, "-shared", "-fPIC", "-w", "driver.c", "-o", "libcuda.so.1"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    return folder


def run(program: str, driver: Path, answers: dict[str, str]) -> str:
    """What a program prints."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(driver)} | answers
    environment.pop("SPARSE_KERNELS_EMULATED", None)
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=driver,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize(("answers", "told"), CASES.values(), ids=CASES)
def test_what_is_told(driver: Path, answers: dict[str, str], told: list[str]) -> None:
    found = run(CALLS, driver, answers)
    for text in told:
        assert text in found


# For each answer of the driver four steps of a decoder of one layer; what they compute is nothing.
STEPS = """
import os

import torch
from sparse_kernels import native
from sparse_kernels.decoder import Decoder
from sparse_kernels.pack import pack
from sparse_kernels.weights import DecoderConfig, EndTensors, LayerShape, LayerTensors


class Part:
    token_ids, start, block_table = [3], 0, [0]


def matrix():
    return torch.zeros(64, 64, dtype=torch.bfloat16)


native.load("cuda").sk_device_load(0, b"x", 1)
config = DecoderConfig(64, 64, 16, 1e-5, torch.ones(8), [LayerShape(4, 4, 64)])
layer = LayerTensors(*(matrix() for _ in range(7)), torch.ones(64), torch.ones(64))
packed = pack(config, EndTensors(matrix(), torch.ones(64)), [layer])
for answer in os.environ["ANSWERS"].split():
    name, value = answer.split("=")
    os.environ[name] = value
    decoder = Decoder(packed, device="cuda")
    kv = decoder.new_kv(1)
    try:
        for _ in range(4):
            decoder.forward([Part], kv, output_rows=[0], temperatures=[1.0])
        print(answer, *decoder.graphs())
    except native.DeviceLost as error:
        print(answer, error)
    del os.environ[name]
"""

# -> graphs made, launched, kept, and why no more are made.
GRAPHS = {
    "FAKE_INIT=0": "1 3 1",
    "FAKE_BEGIN=900": "0 0 0 GPU 0, FAKE: capturing a graph: ERROR_900 (what it means)",
    "FAKE_END=901": "0 0 0 GPU 0, FAKE: ending a capture: ERROR_901 (what it means)",
    "FAKE_INSTANTIATE=2": "0 0 0 GPU 0, FAKE: making a graph: ERROR_2 (what it means)",
    "FAKE_LAUNCH_GRAPH=1": "1 0 0 GPU 0, FAKE: launch of a graph: ERROR_1 (what it means)",
    "FAKE_LAUNCH_GRAPH=700": "GPU 0, FAKE, failed: launch of a graph: ERROR_700",
}


def test_graphs(driver: Path) -> None:
    answers = {"FAKE_MEMORY": str(1 << 30), "ANSWERS": " ".join(GRAPHS)}
    lines = run(STEPS, driver, answers).splitlines()
    for line, (answer, told) in zip(lines, GRAPHS.items(), strict=True):
        assert line.startswith(f"{answer} {told}")
