"""The compiled library: packaging, ABI mirror, refusals, and the memory-read probe."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sparse_kernels
from sparse_kernels import _abi, native
from sparse_kernels._abi import sk_status

REPOSITORY = Path(__file__).resolve().parents[2]
GENERATOR = REPOSITORY / "tools" / "generate_abi.py"
STRUCTS = [
    value
    for value in vars(_abi).values()
    if isinstance(value, type) and issubclass(value, ctypes.Structure)
]
LEVELS = ["portable", "avx2", "avx512", "amx"]
MIB = 1 << 20


def run_python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, away from the source tree, which must not shadow the package."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def probe_structs(**fields: Any) -> tuple[_abi.sk_read_probe_args, _abi.sk_read_probe_result]:
    """Return valid arguments for a short probe, with some fields changed, and room for a result."""
    arguments = native.new_struct(_abi.sk_read_probe_args)
    values = {"buffer_bytes": MIB, "threads": 1, "seconds": 0.001} | fields
    for name, value in values.items():
        setattr(arguments, name, value)
    return arguments, native.new_struct(_abi.sk_read_probe_result)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    pytest.importorskip("pycparser", reason="the generator needs pycparser (extra dev)")
    spec = importlib.util.spec_from_file_location("generate_abi", GENERATOR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestMirror:
    def test_is_current(self, generator: ModuleType) -> None:
        command = [sys.executable, str(GENERATOR), "--check"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_check_reports_a_stale_file(
        self, generator: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        stale = tmp_path / "_abi.py"
        stale.write_text("")
        monkeypatch.setattr(generator, "MIRROR", stale)
        monkeypatch.setattr(sys, "argv", ["generate_abi.py", "--check"])
        assert generator.main() == 1
        assert stale.read_text() == ""

    def test_translates_arrays_pointers_and_hooks(self, generator: ModuleType) -> None:
        python, layout = generator.translate(
            "#define SK_N 3\n"
            "struct sk_a { uint32_t abi_version; uint32_t struct_size; float x[SK_N]; };\n"
            "struct sk_b { uint32_t abi_version; uint32_t struct_size; const struct sk_a* a;\n"
            "  void* data; struct sk_a inner; int32_t (*reduce)(void* user, uint64_t count); };\n"
        )
        module: dict[str, Any] = {}
        exec(python, module)
        a, b = module["sk_a"], module["sk_b"]
        assert [ctypes.sizeof(a), ctypes.sizeof(b)] == [20, 56]
        assert [b.a.offset, b.data.offset, b.inner.offset, b.reduce.offset] == [8, 16, 24, 48]
        assert "FIELD(sk_b, reduce)" in layout

    @pytest.mark.parametrize(
        "header",
        [
            "struct sk_a { uint32_t struct_size; uint32_t abi_version; };",
            "struct sk_a { uint32_t abi_version; uint32_t struct_size; long x; };",
            "struct sk_a { uint32_t abi_version; uint32_t struct_size; uint32_t x : 3; };",
            "enum sk_a { SK_X };",
            "#define SK_X(a) a",
            "typedef uint32_t sk_count;",
        ],
    )
    def test_refuses_what_it_cannot_translate(self, generator: ModuleType, header: str) -> None:
        with pytest.raises(generator.HeaderError):
            generator.translate(header)

    @pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
    def test_has_the_layout_of_the_compiler(self, struct: type[ctypes.Structure]) -> None:
        name = struct.__name__.encode()
        assert library_layout(name, None) == (0, ctypes.sizeof(struct))
        for field in (str(entry[0]) for entry in struct._fields_):
            descriptor = getattr(struct, field)
            expected = (descriptor.offset, descriptor.size)
            assert library_layout(name, field.encode()) == expected, field

    def test_unknown_struct_is_refused(self) -> None:
        with pytest.raises(native.NativeCallError, match="no struct 'sk_nothing'"):
            library_layout(b"sk_nothing", None)


def library_layout(struct: bytes, field: bytes | None) -> tuple[int, int]:
    library = native.load()
    offset, size = ctypes.c_uint64(), ctypes.c_uint64()
    status = library.sk_struct_layout(struct, field, ctypes.byref(offset), ctypes.byref(size))
    native.check(library, status)
    return offset.value, size.value


class TestRefusals:
    @pytest.mark.parametrize(
        ("field", "value", "status", "text"),
        [
            ("abi_version", 99, sk_status.SK_STATUS_ABI_MISMATCH, "99.*library has 9"),
            ("struct_size", 8, sk_status.SK_STATUS_ABI_MISMATCH, "struct_size 8.*library has 48"),
            ("threads", 0, sk_status.SK_STATUS_BAD_SIZE, "threads is 0; it can be 1 to 1024"),
            ("threads", 1025, sk_status.SK_STATUS_BAD_SIZE, "threads is 1025.* 1024"),
            ("buffer_bytes", 0, sk_status.SK_STATUS_BAD_SIZE, "buffer_bytes is 0.* 65536 to"),
            ("buffer_bytes", 65535, sk_status.SK_STATUS_BAD_SIZE, "65535.* 65536 to"),
            ("buffer_bytes", 1 << 41, sk_status.SK_STATUS_BAD_SIZE, "to 1099511627776"),
            ("buffer_bytes", (1 << 64) - 1, sk_status.SK_STATUS_BAD_SIZE, "to 1099511627776"),
            ("pass_bytes", 1 << 41, sk_status.SK_STATUS_BAD_SIZE, "pass_bytes is 2199023255552"),
            ("max_passes", 1 << 31, sk_status.SK_STATUS_BAD_SIZE, "max_passes is 2147483648"),
            ("seconds", 0.0, sk_status.SK_STATUS_BAD_VALUE, "seconds is 0; .* at most 600"),
            ("seconds", -1.0, sk_status.SK_STATUS_BAD_VALUE, "seconds is -1"),
            ("seconds", 601.0, sk_status.SK_STATUS_BAD_VALUE, "seconds is 601"),
            ("seconds", math.nan, sk_status.SK_STATUS_BAD_VALUE, "seconds is -?nan"),
            ("seconds", math.inf, sk_status.SK_STATUS_BAD_VALUE, "seconds is inf"),
            ("isa", 5, sk_status.SK_STATUS_BAD_VALUE, "isa is 5"),
            ("isa", -1, sk_status.SK_STATUS_BAD_VALUE, "isa is -1"),
            ("reserved", 7, sk_status.SK_STATUS_BAD_VALUE, "reserved is 7"),
        ],
    )
    def test_arguments(self, field: str, value: float, status: sk_status, text: str) -> None:
        library = native.load()
        arguments, result = probe_structs(**{field: value})
        with pytest.raises(native.NativeCallError, match=text) as caught:
            native.check(library, library.sk_read_probe(arguments, result))
        assert caught.value.status == status
        assert result.passes == 0

    @pytest.mark.parametrize(("field", "value"), [("abi_version", 0), ("struct_size", 4096)])
    def test_result_of_another_header(self, field: str, value: int) -> None:
        library = native.load()
        arguments, result = probe_structs()
        setattr(result, field, value)
        status = library.sk_read_probe(arguments, result)
        assert status == sk_status.SK_STATUS_ABI_MISMATCH
        assert b"sk_read_probe_result" in library.sk_last_error()

    def test_null_pointers(self) -> None:
        library = native.load()
        arguments, result = probe_structs()
        null = sk_status.SK_STATUS_NULL_POINTER
        assert library.sk_read_probe(None, result) == null
        assert library.sk_read_probe(arguments, None) == null
        assert library.sk_last_error() == b"sk_read_probe_result is a null pointer"
        assert library.sk_cpu_features(None) == null
        assert library.sk_struct_layout(None, None, None, None) == null

    def test_more_memory_than_the_machine_has(self) -> None:
        library = native.load()
        arguments, result = probe_structs(buffer_bytes=1 << 40)
        status = library.sk_read_probe(arguments, result)
        if status == sk_status.SK_STATUS_OK:
            pytest.skip("this machine has a tebibyte of memory")
        assert status == sk_status.SK_STATUS_OUT_OF_MEMORY
        assert str(1 << 40).encode() in library.sk_last_error()

    def test_error_text_is_kept_per_thread(self) -> None:
        library = native.load()
        library.sk_cpu_features(None)
        texts: list[bytes] = []
        thread = threading.Thread(target=lambda: texts.append(library.sk_last_error()))
        thread.start()
        thread.join()
        assert texts == [b""]
        assert library.sk_last_error() == b"sk_cpu_info is a null pointer"

    @pytest.mark.parametrize("field", ["buffer_bytes", "threads"])
    @pytest.mark.parametrize("value", [-1, 1 << 64])
    def test_numbers_that_ctypes_would_cut(self, field: str, value: int) -> None:
        arguments: dict[str, Any] = {"buffer_bytes": MIB, "threads": 1, field: value}
        with pytest.raises(native.NativeCallError, match=str(value)):
            native.read_probe(**arguments)

    def test_more_memory_than_the_process_may_have(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "memory_room", lambda: MIB)
        with pytest.raises(native.NativeCallError, match=f"{MIB} bytes more") as caught:
            native.read_probe(buffer_bytes=2 * MIB)
        assert caught.value.status == sk_status.SK_STATUS_OUT_OF_MEMORY

    @pytest.mark.skipif(
        "libasan" in os.environ.get("LD_PRELOAD", ""), reason="ASan reserves terabytes"
    )
    def test_threads_that_cannot_be_started(self, tmp_path: Path) -> None:
        code = (
            "import resource; from sparse_kernels import native; native.load()\n"
            "pages = int(open('/proc/self/statm').read().split()[0])\n"
            "limit = pages * resource.getpagesize() + (512 << 20)\n"
            "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
            "try: native.read_probe(64 << 20, threads=1024, seconds=0.01)\n"
            "except native.NativeCallError as error: print(error.status.name, error)"
        )
        done = run_python(code, tmp_path)
        assert done.stdout.startswith("SK_STATUS_OUT_OF_MEMORY cannot start 1024 threads"), done


class TestIsaLevel:
    def test_level_in_use_is_the_highest(self) -> None:
        if os.environ.get("SPARSE_KERNELS_ISA"):
            pytest.skip("SPARSE_KERNELS_ISA is set")
        features = native.cpu_features()
        assert features.isa == features.highest_isa
        assert ("amx_bf16" in features.flags) >= (features.isa == "amx")
        assert ("avx512f" in features.flags) >= (features.isa in ("avx512", "amx"))
        assert ("avx2" in features.flags) >= (features.isa in ("avx2", "avx512", "amx"))

    def test_flags_are_those_of_the_operating_system(self) -> None:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        listed = next((line.split()[2:] for line in lines if line.startswith("flags")), [])
        known = {f.name.removeprefix("SK_CPU_").lower() for f in _abi.sk_cpu_flag}
        # The kernel writes avx512_vnni and avx512_bf16, but avx512f.
        expected = known & {name.replace("avx512_", "avx512") for name in listed}
        assert native.cpu_features().flags == expected

    @pytest.mark.parametrize("level", LEVELS)
    def test_environment_forces_a_level(self, level: str, tmp_path: Path) -> None:
        code = (
            "from sparse_kernels import native\n"
            "try: print(native.cpu_features().isa, native.read_probe(1 << 20, 1, 0.001).isa)\n"
            "except native.NativeCallError as error: print(error.status.name, error)"
        )
        done = run_python(code, tmp_path, SPARSE_KERNELS_ISA=level)
        highest = native.cpu_features().highest_isa
        if LEVELS.index(level) <= LEVELS.index(highest):
            assert done.stdout == f"{level} {level}\n", done.stderr
        else:
            expected = f"SPARSE_KERNELS_ISA asks for {level}, but the highest level of this CPU is"
            assert done.stdout == f"SK_STATUS_UNSUPPORTED {expected} {highest}\n", done.stderr

    def test_unknown_level_in_the_environment(self, tmp_path: Path) -> None:
        code = "from sparse_kernels import native; native.cpu_features()"
        done = run_python(code, tmp_path, SPARSE_KERNELS_ISA="avx1024")
        assert done.returncode == 1
        assert (
            "SPARSE_KERNELS_ISA is 'avx1024'; it can be portable, avx2, avx512 or amx"
            in done.stderr
        )

    @pytest.mark.parametrize("level", LEVELS)
    def test_argument_forces_a_level(self, level: str) -> None:
        highest = native.cpu_features().highest_isa
        if LEVELS.index(level) <= LEVELS.index(highest):
            assert native.read_probe(MIB, 1, 0.001, isa=level).isa == level
        else:
            with pytest.raises(native.NativeCallError, match=f"isa asks for {level}"):
                native.read_probe(MIB, 1, 0.001, isa=level)

    def test_unknown_level_as_argument(self) -> None:
        with pytest.raises(native.NativeCallError, match="isa is 'sse'; it can be auto, portable"):
            native.read_probe(MIB, 1, 0.001, isa="sse")


class TestReadProbe:
    def test_numbers_are_sane(self) -> None:
        probe = native.read_probe(buffer_bytes=64 * MIB, seconds=0.05)
        assert 0.1 < probe.gb_per_s <= probe.best_gb_per_s < 100_000
        assert probe.threads == native.usable_cpus()
        assert probe.bytes_read == probe.passes * (64 * MIB // 65536 // probe.threads) * (
            65536 * probe.threads
        )
        mean = probe.bytes_read / probe.seconds / 1e9
        assert mean <= probe.best_gb_per_s * 1.001

    def test_honours_the_time_bound(self) -> None:
        begin = time.perf_counter()
        probe = native.read_probe(buffer_bytes=16 * MIB, seconds=0.05)
        wall = time.perf_counter() - begin
        assert probe.seconds >= 0.05
        assert probe.seconds + probe.setup_seconds <= wall < 2

    def test_honours_the_number_of_passes(self) -> None:
        library = native.load()
        arguments, result = probe_structs(max_passes=3, seconds=60, pass_bytes=MIB)
        native.check(library, library.sk_read_probe(arguments, result))
        assert (result.passes, result.bytes_read) == (3, 3 * MIB)

    def test_buffer_that_does_not_divide(self) -> None:
        library = native.load()
        arguments, result = probe_structs(
            buffer_bytes=10 * 65536 + 1, threads=3, max_passes=2, pass_bytes=7 * 65536, seconds=60
        )
        native.check(library, library.sk_read_probe(arguments, result))
        assert result.buffer_bytes == 9 * 65536
        assert result.bytes_read == 2 * 6 * 65536

    def test_more_threads_than_cpus_are_not_pinned(self) -> None:
        probe = native.read_probe(threads=len(os.sched_getaffinity(0)) + 1, seconds=0.01)
        assert not probe.pinned

    def test_leaves_the_affinity_of_the_caller(self) -> None:
        before = os.sched_getaffinity(0)
        assert native.read_probe(MIB, threads=1, seconds=0.001).pinned
        assert os.sched_getaffinity(0) == before

    def test_two_at_once(self) -> None:
        probes: list[native.ReadProbe] = []
        threads = [
            threading.Thread(target=lambda: probes.append(native.read_probe(MIB, 2, 0.02)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(probes) == 2


class TestLimitsOfTheProcess:
    @pytest.fixture
    def cgroup(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A v2 hierarchy with this process in /pod/app, in place of the machine's own."""
        folder = tmp_path / "cgroup" / "pod" / "app"
        folder.mkdir(parents=True)
        (tmp_path / "cgroup" / "cgroup.controllers").write_text("cpu memory\n")
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / "cgroup").write_text("0::/pod/app\n")
        mount = f"30 25 0:26 / {tmp_path}/cgroup rw,nosuid - cgroup2 cgroup rw\n"
        (tmp_path / "proc" / "mountinfo").write_text(mount)
        folders = native._cgroup_folders
        monkeypatch.setattr(
            native, "_cgroup_folders", lambda controller: folders(controller, tmp_path / "proc")
        )
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
        return tmp_path / "cgroup"

    @pytest.mark.parametrize(
        ("own", "parent", "cpus"),
        [
            ("max 100000", "max 100000", 16),
            ("150000 100000", "max 100000", 2),
            ("max 100000", "300000 100000", 3),
            ("10000 100000", "max 100000", 1),
        ],
    )
    def test_cpu_quota_is_rounded_up(self, cgroup: Path, own: str, parent: str, cpus: int) -> None:
        (cgroup / "pod" / "app" / "cpu.max").write_text(own + "\n")
        (cgroup / "pod" / "cpu.max").write_text(parent + "\n")
        assert native.usable_cpus() == cpus

    def test_cpu_quota_of_the_first_hierarchy(self, cgroup: Path, tmp_path: Path) -> None:
        (tmp_path / "proc" / "cgroup").write_text("4:cpu,cpuacct:/docker/0123\n0::/\n")
        mount = f"30 25 0:26 /docker/0123 {cgroup} rw - cgroup cgroup rw,cpu,cpuacct\n"
        (tmp_path / "proc" / "mountinfo").write_text(mount)
        (cgroup / "cpu.cfs_quota_us").write_text("250000\n")
        (cgroup / "cpu.cfs_period_us").write_text("100000\n")
        assert native.usable_cpus() == 3
        (cgroup / "cpu.cfs_quota_us").write_text("-1\n")
        assert native.usable_cpus() == 16

    def test_memory_room_counts_inactive_page_cache(self, cgroup: Path) -> None:
        folder = cgroup / "pod" / "app"
        (folder / "memory.max").write_text(f"{8 * MIB}\n")
        (folder / "memory.current").write_text(f"{5 * MIB}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {2 * MIB}\n")
        assert native.memory_room() == 5 * MIB

    def test_default_buffer_fits_into_the_room(self, cgroup: Path) -> None:
        (cgroup / "pod" / "memory.max").write_text(f"{32 * MIB}\n")
        (cgroup / "pod" / "memory.current").write_text("0\n")
        assert native.read_probe(threads=1, seconds=0.001).buffer_bytes == 8 * MIB


class TestPackaging:
    def test_missing_library(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(sparse_kernels, "__path__", [str(tmp_path)])
        with pytest.raises(native.NativeLibraryError, match=r"is not in .*pip install") as caught:
            native.cpu_features()
        assert str(tmp_path) in str(caught.value)

    def test_source_tree_that_hides_the_installed_package(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "cpu").mkdir()
        monkeypatch.setattr(sparse_kernels, "__path__", [str(tmp_path)])
        with pytest.raises(native.NativeLibraryError, match="source tree, which Python found"):
            native.load()

    def test_file_that_is_no_library(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / native.LIBRARIES["cpu"]).write_text("text")
        monkeypatch.setattr(sparse_kernels, "__path__", [str(tmp_path)])
        with pytest.raises(native.NativeLibraryError, match=r"cannot be loaded.*pip install"):
            native.load()

    def test_library_of_another_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        path = native._find_library(native.LIBRARIES["cpu"])
        monkeypatch.setattr(_abi, "SK_ABI_VERSION", 99)
        with pytest.raises(native.NativeLibraryError, match=r"ABI version 9, .* needs 99.*install"):
            native._load.__wrapped__(path)

    def test_wheel_binds_to_no_python(self) -> None:
        wheel = importlib.metadata.distribution("sparserve").read_text("WHEEL")
        assert wheel is not None
        tags = [line for line in wheel.splitlines() if line.startswith("Tag: ")]
        assert tags
        assert all(tag.startswith("Tag: py3-none-") for tag in tags)

    def test_header_is_shipped(self) -> None:
        folders = [Path(entry) / "include" for entry in sparse_kernels.__path__]
        assert any((folder / "sparse_kernels.h").is_file() for folder in folders)

    def test_import_loads_nothing(self, tmp_path: Path) -> None:
        code = (
            "import json, sys, sparse_kernels.native\n"
            "maps = open('/proc/self/maps').read()\n"
            "print(json.dumps(['libsparse_kernels' in maps, 'torch' in sys.modules]))"
        )
        assert json.loads(run_python(code, tmp_path).stdout) == [False, False]
