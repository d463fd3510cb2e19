"""How the CUDA kernels are built, on a machine without a GPU: by nvcc, by NVRTC, not at all."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparse_kernels import cuda_code, native
from sparse_kernels.device import describe, devices

SOURCES = Path(__file__).parents[2]
KERNELS = SOURCES / "sparse_kernels" / "cuda"
# Of SK_KERNEL, two of whose blocks a multiprocessor holds, and of SK_LARGE_KERNEL.
MOST_REGISTERS, MOST_REGISTERS_LARGE = 128, 255
FEWEST_KERNELS = 30


def test_library_without_a_gpu():
    library = native.load("cuda")
    count = ctypes.c_uint32()
    native.check(library, library.sk_device_count(ctypes.byref(count)))
    if count.value:
        pytest.skip("there is a GPU")
    assert "driver" in library.sk_last_error().decode()
    assert devices() == []
    with pytest.raises(native.NativeCallError, match=r"there is no cuda:0: .*driver"):
        describe("cuda:0")


@pytest.fixture(scope="module")
def ptxas_log(tmp_path_factory) -> str:
    """Of the kernels for one architecture."""
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("there is no nvcc")
    output = tmp_path_factory.mktemp("nvcc") / "kernels.cubin"
    command = [nvcc, "-std=c++17", "-O3", "--fmad=false", "-arch=sm_90", "-cubin", "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, KERNELS / "kernels.cu", "-o", output],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def declared() -> dict[str, bool]:
    """Whether a kernel is large, by name."""
    text = "".join(path.read_text() for path in KERNELS.glob("*.cuh"))
    kernels = re.findall(r"^SK_(LARGE_)?KERNEL\((\w+), \w+\) \{", text, re.MULTILINE)
    return {name: bool(large) for large, name in kernels}


@pytest.mark.timeout(240)
def test_kernels_spill_nothing(ptxas_log, declared):
    compiled = re.findall(r"Compiling entry function '(\w+)' for 'sm_90'", ptxas_log)
    assert sorted(compiled) == sorted(declared)
    assert len(compiled) >= FEWEST_KERNELS
    spills = re.findall(
        r"properties for (\w+)\n.* (\d+) bytes spill stores, (\d+) bytes spill loads", ptxas_log
    )
    assert {name for name, *_ in spills} >= set(compiled)
    assert [spill for spill in spills if spill[1:] != ("0", "0")] == []


@pytest.mark.timeout(240)
def test_kernels_have_the_registers_that_they_may(ptxas_log, declared):
    used = re.findall(r"function '(\w+)' for 'sm_90'\n.*\n.*\n.*Used (\d+) registers", ptxas_log)
    assert len(used) == len(declared)
    for name, registers in used:
        most = MOST_REGISTERS_LARGE if declared[name] else MOST_REGISTERS
        assert int(registers) <= most, name


def configure(folder: Path, *settings: str) -> subprocess.CompletedProcess:
    if (cmake := shutil.which("cmake")) is None:
        pytest.skip("there is no cmake")
    command = [cmake, "-S", SOURCES, "-B", folder, *(f"-D{setting}" for setting in settings)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_build_that_must_have_nvcc_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDACXX", raising=False)
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    hidden = f"CMAKE_IGNORE_PATH={Path(nvcc).parent};/usr/local/cuda/bin"
    done = configure(tmp_path, "SPARSE_KERNELS_CUDA=ON", hidden)
    assert done.returncode != 0
    text = " ".join(done.stderr.split())
    assert "the CUDA kernels cannot be compiled: nvcc is neither on the PATH nor in CUDACXX" in text
    assert "Install CUDA's toolkit, 12.0 or newer" in text


def test_build_refuses_an_old_nvcc(tmp_path, monkeypatch):
    old = tmp_path / "nvcc"
    old.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    old.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(old))
    done = configure(tmp_path / "build", "SPARSE_KERNELS_CUDA=ON")
    assert done.returncode != 0
    assert "is of CUDA 11.8; 12.0 is needed" in " ".join(done.stderr.split())
    # Where it need not be there, that is no failure.
    done = configure(tmp_path / "build", "SPARSE_KERNELS_CUDA=AUTO")
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels: not compiled" in done.stdout


def test_build_without_kernels(tmp_path):
    done = configure(tmp_path, "SPARSE_KERNELS_CUDA=OFF")
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels: not compiled, SPARSE_KERNELS_CUDA is OFF" in done.stdout


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SPARSERVE_CACHE_DIR", str(tmp_path))
    return tmp_path / "kernels"


def test_no_nvrtc(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(native.NativeLibraryError, match=r"pip install 'sparserve\[cuda\]'"):
        cuda_code.compile_kernels(90)
    assert not cache.exists()


class FakeCompiler:
    """cuda.core, whose code is the text of the options; counts what it compiles."""

    def __init__(self, error: Exception | None = None) -> None:
        self.compiled, self.error = 0, error

    def ProgramOptions(self, **options) -> dict:
        assert options["fma"] is False
        assert options["std"] == "c++17"
        assert (Path(options["include_path"]) / "device.cuh").is_file()
        return options

    def Program(self, text, language, options):
        assert '#include "rows.cuh"' in text

        def compile(target):
            assert (language, target) == ("c++", "cubin")
            if self.error is not None:
                raise self.error
            self.compiled += 1
            return SimpleNamespace(code=f"{options['arch']} {self.compiled}".encode())

        return SimpleNamespace(compile=compile)


def test_code_is_kept_by_capability_and_compiler(cache, monkeypatch):
    compiler = FakeCompiler()
    version = "13.0"
    monkeypatch.setattr(cuda_code, "_nvrtc", lambda: (compiler, version))
    first = cuda_code.compile_kernels(90)
    assert cuda_code.compile_kernels(90) == first == b"sm_90 1"
    assert cuda_code.compile_kernels(80) == b"sm_80 2"
    version = "13.1"
    assert cuda_code.compile_kernels(90) == b"sm_90 3"
    assert [path.suffix for path in cache.iterdir()] == [".cubin"] * 3


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSERVE_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(cuda_code, "_nvrtc", lambda: (FakeCompiler(), "13.0"))
    assert cuda_code.compile_kernels(90) == b"sm_90 1"


def test_text_that_does_not_compile(cache, monkeypatch):
    log = "\n".join(["NVRTC_ERROR_COMPILATION", *(f"kernels.cu({i}): error" for i in range(50))])
    compiler = FakeCompiler(RuntimeError(log))
    monkeypatch.setattr(cuda_code, "_nvrtc", lambda: (compiler, "13.0"))
    with pytest.raises(native.NativeLibraryError) as raised:
        cuda_code.compile_kernels(90)
    text = str(raised.value)
    assert "NVRTC 13.0 cannot compile the CUDA kernels for sm_90: NVRTC_ERROR_COMPILATION" in text
    assert "kernels.cu(8): error" in text
    assert "kernels.cu(9)" not in text
    assert not cache.exists()


@pytest.mark.timeout(240)
def test_nvrtc(cache, monkeypatch):
    pytest.importorskip("cuda.core", reason="NVRTC is not installed")
    image = cuda_code.compile_kernels(90)
    assert image.startswith(b"\x7fELF")
    # From now on without a compiler.
    monkeypatch.setattr(cuda_code, "_compile", lambda *_: pytest.fail("compiled again"))
    assert cuda_code.compile_kernels(90) == image
