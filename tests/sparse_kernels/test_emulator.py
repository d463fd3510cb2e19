"""The emulator of a GPU finds what kernels do wrong: a few wrong kernels, compiled by g++."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "sparse_kernels"

# Each launch is of one block of 64 threads, with a piece of memory of 64 words.
KERNELS = """
#include <cstdio>
#include "device.cuh"
using namespace sk::cuda;

struct Args { uint32_t* words; uint32_t by; };

SK_KERNEL(right, Args) {
  __shared__ uint32_t all[64];
  all[threadIdx.x] = read_once(args.words + threadIdx.x);
  sync_threads();
  uint32_t sum = all[63 - threadIdx.x];
  for (int mask = 16; mask != 0; mask /= 2) sum += shuffle_xor(sum, mask);
  args.words[threadIdx.x] = sum;
}
SK_KERNEL(reads_beyond, Args) { args.words[0] = read_shared(args.words + threadIdx.x + 1); }
SK_KERNEL(reads_before, Args) { args.words[0] = read_once(args.words - 1024 * 1024); }
SK_KERNEL(reads_misaligned, Args) {
  args.words[0] = read_once(reinterpret_cast<const uint4*>(args.words + 1)).x;
}
SK_KERNEL(writes_beyond, Args) { args.words[threadIdx.x + 1] = 1; }
SK_KERNEL(half_syncs, Args) {
  if (threadIdx.x < 32) sync_threads();
}
SK_KERNEL(one_does_not_shuffle, Args) {
  if (threadIdx.x != 5) shuffle_xor(args.by, 1);
}
SK_KERNEL(lanes_diverge, Args) {
  if (threadIdx.x % 2 == 0) shuffle_xor(args.by, 1);
  else ballot(args.by != 0);
}

int main(int, char** argv) {
  auto* words = static_cast<uint32_t*>(sk::emulator::allocate(64 * sizeof(uint32_t)));
  for (uint32_t i = 0; i < 64; ++i) words[i] = i;
  const Args args = {words, 1};
  try {
    sk::emulator::launch(*sk::emulator::find_kernel(argv[1]), argv[1], {}, 64, &args);
  } catch (const sk::emulator::Fault& fault) {
    std::printf("%s", fault.what());
    return 1;
  }
  std::printf("%u %u", words[0], words[63]);
  return 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("there is no g++")
    folder = tmp_path_factory.mktemp("emulator")
    text, program = folder / "kernels.cpp", folder / "kernels"
    text.write_text(KERNELS)
    sources = [text, SOURCES / "emulator" / "block.cpp", SOURCES / "emulator" / "fiber.cpp"]
    folders = [f"-I{SOURCES / name}" for name in ("cuda", "emulator", "common", "include")]
    flags = ["-std=c++17", "-O1", "-DSPARSE_KERNELS_EMULATOR", *folders]
    done = subprocess.run(
        [compiler, *flags, *sources, "-o", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, kernel: str) -> tuple[int, str]:
    done = subprocess.run([program, kernel], capture_output=True, text=True, timeout=10)
    return done.returncode, done.stdout


def test_right_kernel(program):
    # Sums of the words of the other warp.
    assert run(program, "right") == (0, f"{sum(range(32, 64))} {sum(range(32))}")


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (
            "reads_beyond",
            "block 0 0 0, thread 63: reads 4 bytes beyond the end of a piece of memory of 256",
        ),
        ("reads_before", "thread 0: reads outside the device's memory"),
        ("reads_misaligned", "thread 0: reads 16 bytes at an address that is not aligned"),
        ("writes_beyond", "writes beside a piece of memory of 256 bytes"),
        ("half_syncs", "thread 0 is waiting for its block, thread 32 at its end"),
        ("one_does_not_shuffle", "thread 0 is waiting for its warp, thread 5 at its end"),
        ("lanes_diverge", "lanes of its warp are at different places"),
    ],
)
def test_wrong_kernel(program, kernel, fault):
    code, told = run(program, kernel)
    assert code == 1
    assert told.startswith(kernel)
    assert fault in told
