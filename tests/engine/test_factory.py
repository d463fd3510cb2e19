"""Which backend serves, on how many threads, and what is told when it cannot."""

import gc
import logging
import os
import subprocess
import sys
import weakref

import pytest
import torch

from sparse_kernels import arena, native
from sparse_kernels.choice import ChoiceKind
from sparserve.config import EngineSettings
from sparserve.engine import backends, factory
from sparserve.engine.backends import choose_backend
from sparserve.engine.factory import assemble_engine, build_engine, load_by_settings
from sparserve.errors import ConfigError, CorruptCheckpoint, UnusableIndex
from sparserve.model import loader
from sparserve.model.loader import load_model
from sparserve.sparsity.policy import PolicyKind

pytestmark = pytest.mark.usefixtures("no_gpu")


def settings_of(folder, **fields: object) -> EngineSettings:
    defaults = {"model": str(folder), "kv_cache_gib": 0.01, "threads": 1}
    return EngineSettings(**{**defaults, **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("cpu", "bfloat16")),
        ({"dtype": "bfloat16"}, ("cpu", "bfloat16")),
        ({"dtype": "float32"}, ("reference", "float32")),
        ({"dtype": "float16"}, ("reference", "float16")),
        ({"device_map": "auto"}, ("reference", "float32")),
        ({"backend": "cpu"}, ("cpu", "bfloat16")),
        ({"backend": "cpu", "dtype": "bfloat16"}, ("cpu", "bfloat16")),
        ({"backend": "reference"}, ("reference", "float32")),
        ({"backend": "reference", "dtype": "bfloat16"}, ("reference", "bfloat16")),
    ],
    ids=str,
)
def test_auto_is_the_native_backend_wherever_it_can_be(tiny_folder, fields, expected, caplog):
    caplog.set_level(logging.INFO, "sparserve")
    info = build_engine(settings_of(tiny_folder, **fields)).engine.backend.info
    assert (info.name, info.dtype) == expected
    assert f"backend {info.title} on 1 threads" in caplog.text
    reasons = [r.message for r in caplog.records if "the backend is the reference one" in r.message]
    assert len(reasons) == (expected[0] == "reference")
    if "backend" not in fields and reasons:
        (name, value), *_ = fields.items()
        assert name in reasons[0]
        assert value in reasons[0]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"dtype": "float32"}, "dtype is float32 and it needs bfloat16"),
        ({"dtype": "float16"}, "dtype is float16"),
        ({"device_map": "auto"}, "device_map is 'auto' and it needs cpu"),
        ({"device_map": "cuda:0"}, "device_map is 'cuda:0'"),
    ],
    ids=str,
)
def test_the_native_backend_asked_for_where_it_cannot_be(tiny_folder, fields, told):
    settings = settings_of(tiny_folder, backend="cpu", **fields)
    with pytest.raises(ConfigError, match=f"the cpu backend cannot be used: {told}.*--backend"):
        build_engine(settings)


@pytest.mark.parametrize(
    ("fields", "kv_dtype", "bytes_of_a_head"),
    [
        ({}, "bfloat16", 2 * 2 * 16),
        ({"kv_dtype": "bfloat16"}, "bfloat16", 2 * 2 * 16),
        ({"kv_dtype": "int8"}, "int8", 2 * (16 + 2)),  # with a scale for the key and the value
        ({"backend": "reference"}, "float32", 2 * 4 * 16),
        ({"backend": "reference", "dtype": "bfloat16"}, "bfloat16", 2 * 2 * 16),
        (
            {"backend": "reference", "dtype": "bfloat16", "kv_dtype": "bfloat16"},
            "bfloat16",
            2 * 2 * 16,
        ),
    ],
    ids=str,
)
def test_the_cache_has_the_dtype_asked_for_and_its_memory_all_blocks(
    tiny_folder, fields, kv_dtype, bytes_of_a_head, caplog
):
    caplog.set_level(logging.INFO, "sparserve")
    backend = build_engine(settings_of(tiny_folder, **fields)).engine.backend
    config = backend.config
    per_token = config.num_layers * config.num_kv_heads * bytes_of_a_head
    assert config.head_dim == 16
    assert backend.info.kv_dtype == kv_dtype
    assert backend.info.kv_bytes_per_token == per_token
    assert backend.num_blocks == int(0.01 * 2**30) // (per_token * 16)
    assert f"KV cache {backend.num_blocks * 16} tokens in {kv_dtype}" in caplog.text


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"backend": "reference", "kv_dtype": "int8"}, "int8.*the settings ask for it"),
        ({"dtype": "float32", "kv_dtype": "int8"}, "int8.*dtype is float32"),
        ({"device_map": "auto", "kv_dtype": "int8"}, "int8.*device_map is 'auto'"),
        ({"dtype": "float32", "kv_dtype": "bfloat16"}, "bfloat16.*dtype is float32"),
    ],
    ids=str,
)
def test_a_dtype_of_the_cache_that_the_reference_backend_lacks(tiny_folder, fields, told):
    with pytest.raises(ConfigError, match=f"kv_dtype is {told}.*take --kv-dtype same"):
        build_engine(settings_of(tiny_folder, **fields))


def test_a_model_in_memory_decides_by_its_own_dtype(tiny_folder, tiny_model, tiny_bfloat16):
    settings = settings_of(tiny_folder)
    assert assemble_engine(tiny_model, settings).engine.backend.info.name == "reference"
    assert assemble_engine(tiny_bfloat16, settings).engine.backend.info.name == "cpu"
    with pytest.raises(ConfigError, match="dtype is float32"):
        assemble_engine(tiny_model, settings_of(tiny_folder, backend="cpu"))


def test_only_for_the_native_backend_layers_stay_in_the_checkpoint(tiny_folder):
    for backend, kept in (("cpu", False), ("reference", True)):
        layers = load_by_settings(settings_of(tiny_folder, backend=backend)).weights.layers
        assert (layers[0].wq is layers[0].wq) == kept


def test_a_missing_library_is_a_reason_or_an_error(tiny_folder, monkeypatch):
    def missing() -> None:
        raise native.NativeLibraryError("libx.so is not there. Install the package again.")

    monkeypatch.setattr(backends, "cpu_features", missing)
    settings = settings_of(tiny_folder)
    chosen = choose_backend(settings, "auto")
    assert (chosen.name, chosen.reason) == (
        "reference",
        "libx.so is not there. Install the package again.",
    )
    with pytest.raises(ConfigError, match=r"cannot be used: libx.so is not there"):
        choose_backend(settings_of(tiny_folder, backend="cpu"), "auto")


@pytest.mark.parametrize(
    ("level", "told"),
    [
        ("sse9", "SPARSE_KERNELS_ISA is 'sse9'; it can be portable, avx2, avx512 or amx"),
        ("portable", "portable"),
    ],
)
def test_a_level_that_the_environment_forces(tiny_folder, tmp_path, level, told):
    code = (
        "from sparserve.config import EngineSettings\n"
        "from sparserve.engine.factory import build_engine\n"
        "from sparserve.errors import ConfigError\n"
        f"settings = EngineSettings(model={str(tiny_folder)!r}, kv_cache_gib=0.01, threads=1, device='cpu')\n"
        "try: print(build_engine(settings).engine.backend.info.isa)\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SPARSE_KERNELS_ISA": level},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout.strip() == told, done.stderr


def test_a_level_that_this_cpu_lacks_is_told_in_the_librarys_words(tiny_folder, monkeypatch):
    text = "SPARSE_KERNELS_ISA asks for amx, but the highest level of this CPU is avx2"

    def lacking() -> None:
        raise native.NativeCallError(native._abi.sk_status.SK_STATUS_UNSUPPORTED, text)

    monkeypatch.setattr(backends, "cpu_features", lacking)
    for backend in ("auto", "cpu"):
        with pytest.raises(ConfigError, match=f"^{text}$"):
            build_engine(settings_of(tiny_folder, backend=backend))
    assert choose_backend(settings_of(tiny_folder, backend="reference"), "auto")[0] == "reference"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_more_threads_than_cpus_are_not_taken(tiny_folder, backend, caplog, monkeypatch):
    monkeypatch.setattr(factory, "usable_cpus", lambda: 2)
    threads = torch.get_num_threads()
    try:
        for asked, taken in ((0, 2), (1, 1), (2, 2), (3, 2), (1024, 2)):
            caplog.clear()
            settings = settings_of(tiny_folder, backend=backend, threads=asked)
            assert build_engine(settings).engine.backend.info.threads == taken
            warned = f"threads is {asked}, but this process can use only 2 CPUs: taking 2"
            assert (warned in caplog.text) == (asked > 2)
    finally:
        torch.set_num_threads(threads)


def test_nothing_but_the_packed_weights_is_left(tiny_folder, monkeypatch):
    """The file is float32, so each converted tensor would be memory of its own."""
    seen: list[weakref.ref] = []
    real_layer, real_load = loader.read_layer, factory.load_model

    def read_layer(*args):
        layer = real_layer(*args)
        seen.extend(weakref.ref(getattr(layer, name)) for name in ("wq", "w_down", "mlp_norm"))
        return layer

    def load(*args, **kwargs):
        model = real_load(*args, **kwargs)
        weights = model.weights
        seen.extend(map(weakref.ref, (weights.embedding, weights.norm, weights.lm_head)))
        return model

    monkeypatch.setattr(loader, "read_layer", read_layer)
    monkeypatch.setattr(factory, "load_model", load)
    built = build_engine(settings_of(tiny_folder))
    gc.collect()
    assert built.engine.backend.info.name == "cpu"
    assert [ref() for ref in seen] == [None] * (2 * 3 + 3)


def test_weights_beyond_the_memory_are_refused_before_they_are_packed(tiny_bfloat16, monkeypatch):
    monkeypatch.setattr(arena, "memory_room", lambda: 10_000)
    with pytest.raises(ConfigError, match=r"weights of .* do not fit .* bytes are needed.* 10000"):
        assemble_engine(tiny_bfloat16, settings_of(""))


def test_a_shape_that_the_library_refuses_names_the_way_out(write_tiny_checkpoint, tmp_path):
    folder = write_tiny_checkpoint(tmp_path, num_attention_heads=34, num_key_value_heads=1, head_dim=2)  # fmt: skip
    with pytest.raises(ConfigError, match=r"num_heads is 34; .*; take --backend reference"):
        build_engine(settings_of(folder))
    build_engine(settings_of(folder, backend="reference"))


def test_damage_in_a_layer_is_told_as_damage(write_tiny_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_tiny_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, folder / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=name):
        build_engine(settings_of(folder))


def test_the_cache_is_sized_by_the_blocks_of_the_backend(write_tiny_checkpoint, tmp_path):
    """Heads of 10 are padded to 16 in the native cache."""
    folder = write_tiny_checkpoint(tmp_path, head_dim=10)
    token = 2 * 2 * 2 * 2  # layers, K and V, KV heads, bytes
    for backend, dim in (("cpu", 16), ("reference", 10)):
        size = (40.5 * 16 * token * dim) / 2**30
        settings = settings_of(folder, backend=backend, dtype="bfloat16", kv_cache_gib=size)
        assert build_engine(settings).engine.backend.num_blocks == 40


def test_a_model_with_unknown_tensors_is_refused_before_layers_are_read(
    write_tiny_checkpoint, tmp_path
):
    from safetensors.torch import load_file, save_file

    from sparserve.errors import UnsupportedModel

    folder = write_tiny_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    save_file(tensors | extra, folder / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"1 tensors .*q_proj\.bias"):
        load_model(str(folder), layers_at_use=True)


def test_an_index_serves_its_own_model_in_its_own_format(tiny_folder, tiny_index):
    settings = settings_of(tiny_folder, backend="reference", index=str(tiny_index))
    engine = build_engine(settings).engine
    assert PolicyKind.TOKEN in engine.policies.kinds
    assert engine.backend.info.choices == {ChoiceKind.GATE}


@pytest.mark.parametrize("difference", ["weights", "format", "damage", "absence"])
def test_an_index_of_something_else_is_refused_at_startup(
    write_tiny_checkpoint, tiny_folder, tiny_index, tmp_path, difference
):
    folder, fields, index = tiny_folder, {"backend": "reference"}, tiny_index
    if difference == "weights":
        folder = write_tiny_checkpoint(tmp_path / "other", seed=1)
    elif difference == "format":
        fields["dtype"] = "bfloat16"
    elif difference == "damage":
        index = tmp_path / "damaged"
        index.write_bytes(tiny_index.read_bytes()[:-100])
    else:
        index = tmp_path / "absent"
    with pytest.raises(UnusableIndex, match=str(index)):
        build_engine(settings_of(folder, index=str(index), **fields))


@pytest.mark.parametrize("policy", ["auto", "token"])
def test_a_default_policy_that_needs_an_index_is_refused_without_one(tiny_folder, policy):
    settings = settings_of(tiny_folder, backend="reference", default_policy=policy)
    with pytest.raises(ConfigError, match=f"default_policy is {policy}: .*sparserve calibrate"):
        build_engine(settings)
