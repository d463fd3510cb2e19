"""The index file: what is written comes back, what does not fit is refused by name, damage is never trusted."""

import json
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from sparserve.errors import UnusableIndex
from sparserve.sparsity.index import METADATA_KEY, read_index, write_index


@pytest.fixture
def path(tmp_path, index):
    write_index(tmp_path / "index.safetensors", index)
    return tmp_path / "index.safetensors"


def rewritten(path, *, header=(), tensors=(), without=()):
    """The same file with other header values and tensors."""
    with safe_open(path, framework="pt") as file:
        raw = json.loads(file.metadata()[METADATA_KEY]) | dict(header)
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kept = {name: t.clone() for name, t in (kept | dict(tensors)).items() if name not in without}
    save_file(kept, path, {METADATA_KEY: json.dumps(raw)})
    return path


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, (list, tuple)):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif hasattr(one, "__dataclass_fields__"):
        for own in fields(one):
            assert_same(getattr(one, own.name), getattr(other, own.name))
    else:
        assert one == other


def test_what_is_written_comes_back(path, index, key):
    assert_same(read_index(path, key), index)


def test_equal_indices_make_equal_files(path, index, tmp_path):
    write_index(tmp_path / "again", index)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert sorted(own.name for own in tmp_path.iterdir()) == ["again", "index.safetensors"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "other", "model_hash": "12" * 32}, ["tiny", "other", "ab" * 6, "12" * 6]),
        ({"tokenizer_hash": "34" * 32}, ["tokenizer", "cd" * 6, "34" * 6]),
        ({"format": "int4"}, ["int8", "int4"]),
    ],
)
def test_an_index_of_something_else_is_refused_with_both_named(path, key, change, named):
    with pytest.raises(UnusableIndex, match="calibrate") as caught:
        read_index(path, replace(key, **change))
    assert all(word in str(caught.value) for word in named)


def test_an_index_of_another_version_is_refused(path, key):
    with pytest.raises(UnusableIndex, match=r"version 2, this server reads 1"):
        read_index(rewritten(path, header={"version": 2}), key)


def test_a_file_of_another_kind_is_refused(tmp_path, key):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UnusableIndex, match="no calibrated index"):
        read_index(tmp_path / "model.safetensors", key)


def test_a_missing_file_is_refused(tmp_path, key):
    with pytest.raises(UnusableIndex, match="cannot be read"):
        read_index(tmp_path / "none", key)


NAN, INF = float("nan"), float("inf")
CORE = {"kind": "core", "choice": None, "density": 0.5, "kl": 1, "kl_p95": 1, "top1": 1,
        "core": True, "correction": 0}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"header": {"layers": 5}},
        {"header": {"cluster_layer": 4}},
        {"header": {"cluster_layer": True}},
        {"header": {"clusters": 1 << 40}},
        {"header": {"corrections": 2}},
        {"header": {"corrections": 0}},
        {"header": {"settings": []}},
        {"header": {"settings": [CORE] * 1000}},
        {"header": {"settings": [CORE | {"density": 0}]}},
        {"header": {"settings": [CORE | {"density": NAN}]}},
        {"header": {"settings": [CORE | {"kl": INF}]}},
        {"header": {"settings": [CORE | {"kl": -1}]}},
        {"header": {"settings": [CORE | {"top1": 1.5}]}},
        {"header": {"settings": [CORE | {"top1": "1"}]}},
        {"header": {"settings": [CORE | {"kind": "exact"}]}},
        {"header": {"settings": [CORE | {"kind": "rm -rf"}]}},
        {"header": {"settings": [CORE | {"choice": "gate"}]}},
        {"header": {"settings": [CORE | {"correction": 2}]}},
        {"header": {"settings": [7]}},
        {"tensors": {"prior": torch.full((4, 100), NAN)}},
        {"tensors": {"prior": torch.full((4, 100), -1.0)}},
        {"tensors": {"prior": torch.zeros(4, 99)}},
        {"tensors": {"prior": torch.zeros(4, 100).half()}},
        {"tensors": {"centroids": torch.full((2, 100), 7.0)}},
        {"tensors": {"planes_factors": torch.full((4, 100), INF)}},
        {"tensors": {"setting.0.shares": torch.full((4,), 1.5)}},
        {"tensors": {"setting.0.shares": torch.zeros(4)}},
        {"tensors": {"setting.4.thresholds": torch.full((4, 3), NAN)}},
        {"tensors": {"setting.4.thresholds": torch.full((4, 3), -1.0)}},
        {"tensors": {"correction.1.inputs": torch.zeros(4, 65, 16).bfloat16()}},
        {"tensors": {"correction.1.inputs": torch.zeros(4, 2, 16).bfloat16()}},
        {"tensors": {"correction.1.outputs": torch.full((4, 3, 16), INF).bfloat16()}},
        {"tensors": {"unknown": torch.zeros(1)}},
        {"without": ["prior"]},
        {"without": ["planes_factors"]},
        {"without": ["setting.0.shares"]},
        {"without": ["correction.1.outputs"]},
    ],
    ids=str,
)
def test_values_that_cannot_be_are_refused(path, key, change):
    with pytest.raises(UnusableIndex, match="damaged"):
        read_index(rewritten(path, **change), key)


@given(data=st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damage_anywhere_is_refused_or_leaves_an_index_of_values_in_range(path, key, data):
    whole = path.read_bytes()
    damaged = path.with_name("damaged")
    if data.draw(st.booleans(), label="truncated"):
        damaged.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1), label="length")])
        with pytest.raises(UnusableIndex):
            read_index(damaged, key)
        return
    at = data.draw(st.integers(0, 6000) | st.integers(0, len(whole) - 1), label="at")
    changed = bytearray(whole)
    changed[at] ^= data.draw(st.integers(1, 255), label="bits")
    damaged.write_bytes(changed)
    try:
        found = read_index(damaged, key)
    except UnusableIndex:
        return
    assert found.prior.isfinite().all()
    assert all(0 < own.density <= 1 and own.kl >= 0 for own in found.settings)
