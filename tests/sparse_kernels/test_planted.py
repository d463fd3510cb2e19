"""Bugs that are planted into what computes on a GPU: the tests that run on the emulator find them."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparse_kernels import native

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "sparse_kernels"
DECODER = "tests/sparse_kernels/test_decoder.py::test_every_level_computes_what_the_model_means"
CHOICE = "tests/sparse_kernels/test_choice.py::test_every_level_computes_what_a_choice_means"
FORMATS = "tests/sparse_kernels/test_layer_formats.py"
GRAPHS = "tests/sparse_kernels/test_graphs.py"


@dataclass(frozen=True)
class Bug:
    file: str
    right: str
    wrong: str
    test: str  # that finds it
    cases: str = "emulator"  # of it, as -k
    twin: tuple[str, str] = ("", "")  # replaced too


BUGS = {
    "warps' sums are read before all are there": Bug(
        "product.cuh",
        "    }\n    sync_threads();\n    float sum = 0.0f;",
        "    }\n    float sum = 0.0f;",
        DECODER,
        "emulator and plain",
    ),
    "a neuron that a token does not use counts": Bug(
        "activate.cuh", "own.reads.used ? silu", "true ? silu", CHOICE, "emulator and plain"
    ),
    "another group's scale": Bug(
        "product.cuh",
        "uint64_t{row} * w.groups + group;",
        "uint64_t{row} * w.groups + group / 2 * 2;",
        FORMATS,
    ),
    "a sum leaves half of a warp out": Bug(
        "block.cuh",
        "for (int mask = 16; mask != 0; mask /= 2) v += shuffle_xor(v, mask);",
        "for (int mask = 8; mask != 0; mask /= 2) v += shuffle_xor(v, mask);",
        DECODER,
        "emulator and plain",
    ),
    "the inputs of a neighbouring token": Bug(
        "product.cuh",
        "uint64_t{tokens.first + 4 * tile + t} * operand.groups",
        "uint64_t{tokens.first + 4 * tile + t / 2} * operand.groups",
        FORMATS,
    ),
    "a graph for fewer chunks of attention": Bug(
        "pass_layout.cpp", "key.chunks = most_chunks_;", "key.chunks = 1;", GRAPHS
    ),
    "a graph for another KV pool": Bug(
        "pass_layout.cpp", "key.kv = args_.kv;", "key.kv = nullptr;", GRAPHS
    ),
    "a graph for another number of outputs": Bug(
        "pass_layout.cpp",
        "key.outputs = static_cast<uint32_t>(outputs_.size());",
        "key.outputs = 0;",
        GRAPHS,
    ),
    "a graph with a stale block table": Bug(
        "pass_layout.cpp",
        "const size_t tokens = step_.add(tokens_),",
        "const size_t table = step_.add(tables), tokens = step_.add(tokens_),",
        GRAPHS,
        twin=("  const size_t table = step_.add(tables);\n", ""),
    ),
    "a graph for steps that choose otherwise": Bug(
        "pass_layout.cpp", "key.planes = planes_;", "key.planes = false;", GRAPHS
    ),
}
# Compiling takes a quarter of a minute each.
QUICK = 2
PARAMETERS = [
    pytest.param(bug, id=name, marks=[] if i < QUICK else [pytest.mark.soak])
    for i, (name, bug) in enumerate(BUGS.items())
]


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("there is no g++")
    try:
        native.load("emulator")
    except native.NativeLibraryError as error:
        pytest.skip(str(error))
    return found


@pytest.fixture(scope="module")
def host_objects(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """All of the emulated library but its kernels."""
    folder = tmp_path_factory.mktemp("host")
    sources = [
        *sorted((SOURCES / "common").glob("*.cpp")),
        *sorted((SOURCES / "emulator").glob("*.cpp")),
        *(path for path in sorted((SOURCES / "cuda").glob("*.cpp")) if path.stem not in OF_NVIDIA),
    ]
    command = [compiler, *FLAGS, *includes(SOURCES / "cuda"), "-c", *map(str, sources)]
    subprocess.run(command, cwd=folder, check=True, timeout=240)
    return sorted(map(str, folder.glob("*.o")))


OF_NVIDIA = ("driver_nvidia", "gpu", "gpu_code", "image", "libcuda")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DSPARSE_KERNELS_EMULATOR")


def includes(kernels: Path) -> list[str]:
    folders = (kernels, SOURCES / "emulator", SOURCES / "include", SOURCES / "common")
    return [f"-I{folder}" for folder in folders]


def run_with(
    bug: Bug, compiler: str, host_objects: list[str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """The bug's test, on the emulated library with the bug."""
    kernels = folder / "cuda"
    shutil.copytree(SOURCES / "cuda", kernels)
    text = (kernels / bug.file).read_text()
    assert bug.right in text
    assert bug.twin[0] in text
    (kernels / bug.file).write_text(text.replace(bug.right, bug.wrong).replace(*bug.twin))
    library = folder / "libwrong.so"
    own = Path(bug.file).with_suffix(".o").name
    others = [path for path in host_objects if Path(path).name != own]
    command = [compiler, *FLAGS, *includes(kernels), "-shared", "-o", str(library), *others]
    command += ["-x", "c++", str(kernels / "kernels.cu")]
    if bug.file.endswith(".cpp"):
        command += [str(kernels / bug.file)]
    subprocess.run(command, check=True, timeout=240)
    arguments = ["-q", "-x", "-p", "no:cacheprovider", bug.test, "-k", bug.cases]
    return subprocess.run(
        [sys.executable, "-P", "-m", "pytest", *arguments],  # of the installed package
        cwd=ROOT,
        env=os.environ | {native.EMULATED: str(library)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("bug", PARAMETERS)
def test_tests_find_it(bug: Bug, compiler: str, host_objects: list[str], tmp_path: Path) -> None:
    found = run_with(bug, compiler, host_objects, tmp_path)
    assert found.returncode == pytest.ExitCode.TESTS_FAILED, found.stdout + found.stderr


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_without_a_bug_they_find_none(compiler, host_objects, tmp_path):
    none = Bug("pass_layout.cpp", "key.kv = args_.kv;", "key.kv = args_.kv;", GRAPHS)
    found = run_with(none, compiler, host_objects, tmp_path)
    assert found.returncode == pytest.ExitCode.OK, found.stdout + found.stderr
