"""Which backend and device settings come to, and what fits on a GPU, whose description is made up."""

import logging
from dataclasses import replace

import pytest

from sparse_kernels._abi import sk_status
from sparse_kernels.device import Device
from sparse_kernels.formats import DecoderFormats
from sparse_kernels.native import EMULATED, NativeCallError, NativeLibraryError
from sparserve.config import EngineSettings
from sparserve.engine import backends, memory
from sparserve.engine.backends import Chosen, choose_backend
from sparserve.engine.block_manager import blocks_for
from sparserve.engine.factory import assemble_engine
from sparserve.engine.formats import with_dtype
from sparserve.engine.memory import GIB, STEP_BYTES, check_weights, size_cache
from sparserve.errors import ConfigError
from sparserve.model.weight_bytes import bytes_of_weights

GPU = Device("cuda", 0, "NVIDIA H200", 141 * GIB, 140 * GIB, 90, 132, 13000, coded=True)
NO_GPU = NativeCallError(sk_status.SK_STATUS_UNSUPPORTED, "there is no cuda:0: no driver")


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(count)`: a machine with so many; `gpus(error)`: with none, for that reason."""

    def have(count: int | Exception) -> None:
        def usable(place: str) -> Device:
            if isinstance(count, Exception):
                raise count
            index = int(place.partition(":")[2] or 0)
            if index >= count:
                raise NativeCallError(sk_status.SK_STATUS_UNSUPPORTED, f"there is no {place}")
            return replace(GPU, index=index)

        monkeypatch.delenv(EMULATED, raising=False)
        monkeypatch.setattr(backends, "usable", usable)

    return have


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("cuda", "", "cuda:0")),
        ({"device": "cuda"}, ("cuda", "", "cuda:0")),
        ({"device": "cuda:1"}, ("cuda", "", "cuda:1")),
        ({"backend": "cuda"}, ("cuda", "", "cuda:0")),
        ({"backend": "cuda", "device": "cuda:1"}, ("cuda", "", "cuda:1")),
        ({"dtype": "int4"}, ("cuda", "", "cuda:0")),
        ({"device": "cpu"}, ("cpu", "the settings ask for it", "cpu")),
        ({"backend": "cpu"}, ("cpu", "the settings ask for it", "cpu")),
        (
            {"lm_head_dtype": "int4+exact"},
            ("cpu", "lm_head_dtype is int4+exact, which the CPU alone computes", "cpu"),
        ),
        ({"backend": "reference"}, ("reference", "the settings ask for it", "cpu")),
        ({"backend": "reference", "device": "cpu"}, ("reference", "the settings ask for it", "cpu")),
        ({"dtype": "float32"}, ("reference", "dtype is float32 and it needs bfloat16, int8 or int4", "cpu")),
    ],
    ids=str,
)  # fmt: skip
def test_where_there_are_gpus(gpus, fields, expected):
    gpus(2)
    settings = EngineSettings(**fields)
    assert choose_backend(settings, settings.dtype) == Chosen(*expected)


@pytest.mark.parametrize("error", [NO_GPU, NativeLibraryError("libx.so is not in here")], ids=str)
def test_where_there_is_none(gpus, error):
    gpus(error)
    assert choose_backend(EngineSettings(), "auto") == Chosen("cpu", str(error))
    for fields in ({"device": "cuda"}, {"backend": "cuda"}, {"device": "cuda:3", "dtype": "int8"}):
        with pytest.raises(ConfigError) as told:
            choose_backend(EngineSettings(**fields), "auto")
        assert str(told.value) == f"the cuda backend cannot be used: {error}; take --device cpu"


def test_the_gpu_is_looked_at_once(gpus, monkeypatch):
    gpus(1)
    looked, usable = [], backends.usable
    monkeypatch.setattr(backends, "usable", lambda place: (looked.append(place), usable(place))[1])
    for fields in ({}, {"device": "cuda"}, {"backend": "cuda"}):
        assert choose_backend(EngineSettings(**fields), "auto").device == "cuda:0"
    assert looked == ["cuda"] * 3


def test_the_log_says_once_why_it_is_no_gpu(gpus, tiny_bfloat16, caplog):
    caplog.set_level(logging.INFO, "sparserve")
    for fields, lines in (({}, 1), ({"device": "cpu"}, 0), ({"backend": "cpu"}, 0)):
        gpus(NO_GPU)
        caplog.clear()
        settings = EngineSettings(threads=1, kv_cache_gib=0.01, **fields)
        info = assemble_engine(tiny_bfloat16, settings).engine.backend.info
        assert (info.name, info.device) == ("cpu", "cpu")
        told = [r.message for r in caplog.records if "no driver" in r.message]
        assert told == [f"the device is the CPU: {NO_GPU}"] * lines


def test_the_emulator_is_taken_only_where_a_gpu_is_asked_for(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setenv(EMULATED, "/some/where.so")
    chosen = choose_backend(EngineSettings(), "auto")
    assert chosen.name == "cpu"
    assert EMULATED in chosen.reason
    assert choose_backend(EngineSettings(device="cuda"), "auto").name == "cuda"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"backend": "cpu", "device": "cuda"}, "backend is cpu and device is cuda; give one of them"),
        ({"backend": "cuda", "device": "cpu"}, "backend is cuda and device is cpu; give one"),
        ({"backend": "reference", "device": "cuda:1"}, "device is cuda:1, .*take --device-map cuda:1"),
        ({"device": "cuda:2"}, "cuda backend cannot be used: there is no cuda:2; take --device cpu"),
        ({"device": "cuda", "lm_head_dtype": "int4+exact"}, r"int4\+exact, which the CPU alone .*take --device cpu"),
        ({"device": "cuda", "dtype": "float16"}, "cuda backend cannot be used: dtype is float16 .* --backend reference"),
        ({"device": "cuda", "dtype": "int8", "device_map": "auto"}, "dtype is int8, which only the cuda backend .* device_map is 'auto'"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_contradict_each_other_or_the_machine(gpus, fields, told):
    gpus(2)
    settings = EngineSettings(**fields)
    with pytest.raises(ConfigError, match=told):
        choose_backend(settings, settings.dtype)


def test_an_original_to_compare_with_needs_no_gpu(gpus):
    gpus(NO_GPU)
    settings = EngineSettings(device="cuda", dtype="int8")
    assert choose_backend(with_dtype(settings, "float32"), "float32").name == "reference"
    for dtype in ("bfloat16", "int4"):
        with pytest.raises(ConfigError, match="no driver"):
            choose_backend(with_dtype(settings, dtype), dtype)


@pytest.fixture
def free(monkeypatch):
    """`free(bytes)`: on the only GPU, beside what a step needs."""
    return lambda size: monkeypatch.setattr(
        memory, "describe", lambda place: replace(GPU, free_bytes=size + STEP_BYTES)
    )


BLOCK = 4 << 20


def test_the_cache_takes_its_share_of_what_is_free_on_the_gpu(free):
    free(1000 * BLOCK)
    settings = EngineSettings(max_running=16, gpu_memory_utilization=0.5)
    assert size_cache(settings, BLOCK, 6400, "cuda:0") == (500, 6400)
    few = EngineSettings(max_running=1, max_batched_tokens=1)
    assert size_cache(few, BLOCK, 6400, "cuda:0") == (400, 6400), "one context is enough for one"
    asked = EngineSettings(kv_cache_gib=990 * BLOCK / GIB)
    assert size_cache(asked, BLOCK, 6400, "cuda:0") == (990, 6400)


def test_a_cache_that_the_gpu_cannot_hold(free, caplog):
    free(1000 * BLOCK)
    with pytest.raises(
        ConfigError, match=r"kv_cache_gib 4 is more than the 3.9 GiB of free memory"
    ):
        size_cache(EngineSettings(kv_cache_gib=4), BLOCK, 6400, "cuda:0")
    settings = EngineSettings(max_context=16000)
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization 0.9 .*cuda:0 NVIDIA H200 .*14400 tokens .*lower --max-context"):  # fmt: skip
        size_cache(settings, BLOCK, 16000, "cuda:0")
    assert size_cache(EngineSettings(), BLOCK, 16000, "cuda:0") == (900, 14400)
    assert "serving a context of 14400; take --kv-dtype int8 for more" in caplog.text
    assert blocks_for(14400) == 900
    free(-STEP_BYTES)
    with pytest.raises(ConfigError, match="holds 0 tokens"):
        size_cache(EngineSettings(), BLOCK, 16, "cuda:0")


def test_weights_that_the_gpu_cannot_hold_are_told_with_what_would_fit(free, tiny_bfloat16):
    settings, formats = EngineSettings(), DecoderFormats()
    needed = bytes_of_weights(tiny_bfloat16.config, formats)
    free(needed)
    check_weights(tiny_bfloat16, formats, settings, "cuda:0")
    free(needed - 1)
    with pytest.raises(ConfigError, match=r"need .* GiB, and cuda:0 NVIDIA H200 has .*; try --dtype int8 \(about .* GiB\) or --dtype int4 \(about .*\) or --device cpu or --backend reference --device-map auto"):  # fmt: skip
        check_weights(tiny_bfloat16, formats, settings, "cuda:0")


def test_weights_are_all_matrices_and_vectors_once(tiny_bfloat16):
    """The tiny model's LM head is a matrix of its own."""
    config = tiny_bfloat16.config
    assert not config.tie_word_embeddings
    vectors = config.hidden_size * (2 * config.num_layers + 1)  # norms, in float32
    expected = 2 * (config.num_parameters - vectors) + 4 * vectors
    assert bytes_of_weights(config, DecoderFormats()) == expected
    tied = replace(config, tie_word_embeddings=True)
    table = 2 * config.vocab_size * config.hidden_size
    assert bytes_of_weights(tied, DecoderFormats()) == expected - table
