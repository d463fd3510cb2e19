"""The original's states are kept, exactly, and made anew when anything they depend on changes."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest

from sparserve.bench import original as module
from sparserve.bench.cache import FileCache
from sparserve.bench.original import Original, original_states
from sparserve.bench.quality import cut_windows
from sparserve.errors import ConfigError
from sparserve.model.reference import ReferenceBackend


@pytest.fixture
def cache(tmp_path) -> FileCache:
    return FileCache(tmp_path / "kept", 1 << 20)


@pytest.fixture
def windows():
    return cut_windows([i * 7 % 251 for i in range(300)], 3, 30, 9)


@pytest.fixture
def computed(monkeypatch):
    """How many windows were computed so far."""
    calls = []

    class Counting(ReferenceBackend):
        def forward(self, batch):
            calls.append(batch)
            return super().forward(batch)

    monkeypatch.setattr(module, "ReferenceBackend", Counting)
    return calls


def states_of(model, windows, cache) -> np.ndarray:
    return original_states(model, windows, 1, cache, lambda *_: None)


def test_a_second_time_nothing_is_computed_and_every_bit_is_the_same(
    tiny_model, windows, cache, computed
):
    first = states_of(tiny_model, windows, cache)
    assert len(computed) == len(windows)
    second = states_of(tiny_model, windows, cache)
    assert len(computed) == len(windows)
    uncached = states_of(tiny_model, windows, None)
    assert first.shape == (3, 9, tiny_model.config.hidden_size)
    for states in (second, uncached):
        np.testing.assert_array_equal(first, states)
        ours, again = (
            np.stack([*Original(tiny_model, windows, each).logits(windows)])
            for each in (first, states)
        )
        np.testing.assert_array_equal(ours, again)


def test_other_windows_weights_and_code_are_computed_anew(
    tiny_model, windows, cache, computed, monkeypatch
):
    states_of(tiny_model, windows, cache)
    changed = replace(windows[2], fed=(*windows[2].fed[:-1], 77))
    states_of(tiny_model, [*windows[:2], changed], cache)
    assert len(computed) == 6
    layers = list(tiny_model.weights.layers)
    layers[1] = replace(layers[1], w_down=layers[1].w_down + 1e-6)
    states_of(
        replace(tiny_model, weights=replace(tiny_model.weights, layers=layers)), windows, cache
    )
    assert len(computed) == 9
    monkeypatch.setattr(module, "COMPUTATION", 1000)
    states_of(tiny_model, windows, cache)
    assert len(computed) == 12


def test_a_damaged_file_is_computed_anew(tiny_model, windows, cache, computed, tmp_path):
    first = states_of(tiny_model, windows, cache)
    (kept,) = (tmp_path / "kept").iterdir()
    for content in (b"", kept.read_bytes()[:-40], b"not numpy's at all"):
        kept.unlink()  # `first` is mapped
        kept.write_bytes(content)
        np.testing.assert_array_equal(states_of(tiny_model, windows, cache), first)
    assert len(computed) == 12


def test_what_was_used_longest_ago_gives_way(tmp_path):
    cache = FileCache(tmp_path, 25)
    for key in "abc":
        with cache.writing(key) as path:
            path.write_bytes(b"x" * 10)
        if key == "b":
            assert cache.find("a") is not None  # used after b
    assert [key for key in "abc" if cache.find(key)] == ["a", "c"]
    with cache.writing("large") as path:
        path.write_bytes(b"x" * 100)
    assert [entry.name for entry in tmp_path.iterdir()] == ["large"]


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    for name, age in (
        ("unfinished-old", 2 * 86400),
        ("unfinished-new", 60),
        ("another", 2 * 86400),
    ):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with FileCache(tmp_path, 25).writing("a") as path:
        path.touch()
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", "another", "unfinished-new"}


def test_what_fails_leaves_nothing(tmp_path):
    cache = FileCache(tmp_path / "kept", 25)

    def fail_halfway() -> None:
        with cache.writing("a") as path:
            path.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    assert list((tmp_path / "kept").iterdir()) == []
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="set SPARSERVE_CACHE_DIR"),
        FileCache(tmp_path / "file", 25).writing("a"),
    ):
        pass
