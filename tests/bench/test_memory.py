"""What /proc tells of a process, and the processes that systems are measured in."""

import dataclasses
import resource
from importlib.util import find_spec
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path

import numpy as np
import pytest

from sparserve.bench.memory import Plan, Row, checkpoint_bytes, measure_memory
from sparserve.bench.memory_child import RIVALS, Resident, resident
from sparserve.bench.peers.registry import PEERS, PeerSpec
from sparserve.config import ServerSettings
from sparserve.model.loader import load_model

STATUS = Path("/proc/self/status")


def test_what_is_resident_is_what_the_system_counts():
    pages = Path("/proc/self/statm").read_text().split()
    found = resident(STATUS.read_text())
    assert found.total == pytest.approx(int(pages[1]) * resource.getpagesize(), rel=0.05)
    assert found.file == pytest.approx(int(pages[2]) * resource.getpagesize(), rel=0.05)
    assert found.total == found.anonymous + found.file
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert found.peak == pytest.approx(most, rel=0.05)


def test_memory_that_was_given_back_stays_in_the_peak():
    before = resident(STATUS.read_text())
    size = 64 << 20
    # Not of the allocator, which may keep what it was given back.
    with mmap(-1, size, MAP_PRIVATE | MAP_ANONYMOUS) as held:
        held.write(bytes(size))
        during = resident(STATUS.read_text())
    assert during.anonymous - before.anonymous >= 0.95 * size
    after = resident(STATUS.read_text())
    assert after.anonymous < during.anonymous - (60 << 20)
    assert after.peak >= during.total - (1 << 20)


def test_a_mapped_file_counts_as_file(tmp_path):
    np.zeros(16 << 20, np.uint8).tofile(tmp_path / "x")
    before = resident(STATUS.read_text())
    mapped = np.memmap(tmp_path / "x", np.uint8, "r")
    assert mapped.sum() == 0  # every page is read
    after = resident(STATUS.read_text())
    assert after.file - before.file == pytest.approx(16 << 20, rel=0.05)


def test_a_source_is_a_file_or_the_weights_of_a_folder(tiny_folder, tmp_path):
    files = [path.stat().st_size for path in tiny_folder.glob("*.safetensors")]
    assert checkpoint_bytes(tiny_folder) == sum(files) > 0
    (tmp_path / "x.gguf").write_bytes(b"12345")
    assert checkpoint_bytes(tmp_path / "x.gguf") == 5


def test_limits_are_those_of_their_definition():
    moment = Resident(1, 1, 0, 1)
    row = Row("sparserve", "int8", 1_000_000_000, 500_000_000, 50_000_000, moment, moment, moment)
    assert row.serving_limit == 1_000_000_000
    assert row.loading_limit == 2_300_000_000
    smaller = dataclasses.replace(row, kv_bytes=0)
    assert row.serving_limit - smaller.serving_limit == 50_000_000


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_a_rivals_memory_is_its_own(write_mergeable, tmp_path):
    folder = str(write_mergeable(tmp_path / "m"))
    report = measure_memory(
        ServerSettings(model=folder, threads=1, host="127.0.0.1", port=0, metrics_port=0),
        Plan(batch=1, context=40, new_tokens=4),
        ["auto"],
        [PeerSpec("llama.cpp")],
        lambda dtype: load_model(folder, dtype="bfloat16"),
        lambda *_: None,
    )
    ours, rival = report.rows
    assert (ours.format, rival.system, rival.format) == ("bfloat16", "llama.cpp", "bfloat16")
    assert rival.weight_bytes == rival.source_bytes > 0
    assert rival.kv_bytes == (40 + 4) * 2 * 2 * 2 * 16 * 2
    assert 10e6 < rival.imported.total < 0.5 * ours.imported.total  # without torch
    assert rival.imported.total < rival.loaded.total <= rival.loaded.peak <= rival.served.peak


def test_rivals_are_peers():
    assert RIVALS.keys() == PEERS.keys() - {"transformers"}
