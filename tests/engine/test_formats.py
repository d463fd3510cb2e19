"""Formats of weights from settings: what each means, and what contradicts itself."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_kernels.formats import BFLOAT16, DecoderFormats, MatrixFormat
from sparserve.config import EngineSettings
from sparserve.engine.backends import choose_backend
from sparserve.engine.factory import (
    assemble_engine,
    build_engine,
    format_name,
    load_by_settings,
    make_decoders,
)
from sparserve.engine.formats import weight_formats, with_dtype
from sparserve.errors import ConfigError

INT8, INT4 = MatrixFormat(8, 64), MatrixFormat(4, 64)
# Attention has smaller groups unless told otherwise.
ALL_INT8 = DecoderFormats(MatrixFormat(8, 32), INT8, INT8, INT8)
ALL_INT4 = DecoderFormats(MatrixFormat(4, 32), INT4, INT4, INT8)

pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, DecoderFormats()),
        ({"dtype": "float32"}, DecoderFormats()),
        ({"dtype": "int8"}, ALL_INT8),
        ({"dtype": "int4"}, ALL_INT4),
        ({"dtype": "int4", "lm_head_dtype": "int4"}, replace(ALL_INT4, lm_head=INT4)),
        ({"dtype": "int4", "group_size": 64}, replace(ALL_INT4, attention=INT4)),
        ({"dtype": "int4", "lm_head_dtype": "bfloat16"}, replace(ALL_INT4, lm_head=BFLOAT16)),
        ({"lm_head_dtype": "int4+exact"}, DecoderFormats(lm_head_scan=True)),
        (
            {"dtype": "int4", "lm_head_dtype": "int4+exact"},
            replace(ALL_INT4, lm_head=BFLOAT16, lm_head_scan=True),
        ),
        ({"dtype": "int8", "attention_dtype": "bfloat16"}, replace(ALL_INT8, attention=BFLOAT16)),
        ({"dtype": "int8", "mlp_dtype": "int4"}, replace(ALL_INT8, gate_up=INT4, down=INT4)),
        ({"mlp_dtype": "int4"}, DecoderFormats(gate_up=INT4, down=INT4)),
        ({"dtype": "int8", "group_size": 32}, DecoderFormats(*4 * [MatrixFormat(8, 32)])),
        ({"dtype": "int8", "activation_bits": 8}, replace(ALL_INT8, activation_bits=8)),
        (
            {"dtype": "int8", "weight_planes": "4+4"},
            replace(ALL_INT8, gate_up=MatrixFormat(8, 64, low_bits=4)),
        ),
        (
            {"dtype": "int4", "weight_planes": "2+2"},
            replace(ALL_INT4, gate_up=MatrixFormat(4, 64, low_bits=2)),
        ),
        (
            {"mlp_dtype": "int4", "weight_planes": "3+1", "group_size": 128},
            DecoderFormats(gate_up=MatrixFormat(4, 128, low_bits=1), down=MatrixFormat(4, 128)),
        ),
    ],
    ids=str,
)
def test_settings_mean_formats(fields, expected):
    assert weight_formats(EngineSettings(**fields)) == expected


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"dtype": "int8", "weight_planes": "2+2"}, r"weight_planes is 2\+2, which int4 can have, .* are int8; take --weight-planes whole or --mlp-dtype int4"),
        ({"dtype": "int4", "weight_planes": "4+4"}, r"4\+4, which int8 .* are int4"),
        ({"dtype": "int8", "down_planes": "same"}, "weight_planes whole: there are no planes"),
        ({"weight_planes": "3+1"}, r"weight_planes is 3\+1, .* are bfloat16"),
        ({"dtype": "int8", "mlp_dtype": "bfloat16", "weight_planes": "4+4"}, "are bfloat16"),
        ({"group_size": 32}, "group_size is 32, and no matrix is of integers; take --dtype int8"),
        ({"dtype": "float32", "activation_bits": 8}, "activation_bits is 8, and no matrix"),
        ({"backend": "reference", "dtype": "int8"}, "dtype is int8, which the reference backend cannot compute; take --backend cpu"),
        ({"backend": "reference", "mlp_dtype": "bfloat16"}, "mlp_dtype is bfloat16, which the ref"),
        ({"device_map": "auto", "dtype": "int4"}, "dtype is int4, which only the cpu backend computes, and .* device_map is 'auto' and it needs cpu"),
        ({"device_map": "cuda:0", "lm_head_dtype": "int8"}, "lm_head_dtype is int8, which only"),
        ({"dtype": "float32", "attention_dtype": "int8"}, "attention_dtype is int8, .* dtype is float32 and it needs bfloat16, int8 or int4"),
        ({"backend": "cpu", "dtype": "float16", "mlp_dtype": "int8"}, "mlp_dtype is int8, .* dtype is float16"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_be_are_told_before_anything_is_loaded(fields, told):
    settings = EngineSettings(model="there is none", **fields)
    with pytest.raises(ConfigError, match=told):
        build_engine(settings)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_auto_is_the_native_backend(dtype):
    assert choose_backend(EngineSettings(dtype=dtype), dtype)[0] == "cpu"
    assert choose_backend(EngineSettings(dtype=dtype), "bfloat16")[0] == "cpu"


def test_a_model_in_memory_that_cannot_be_quantized(tiny_model):
    with pytest.raises(ConfigError, match=r"dtype is int8, .* dtype is float32 and it needs"):
        assemble_engine(tiny_model, EngineSettings(dtype="int8"))


def test_details_of_integers_stay_where_there_are_integers():
    """With one set of flags several formats are measured."""
    asked = EngineSettings(group_size=32, activation_bits=8, dtype="int8", mlp_dtype="int4")
    for dtype in ("int8", "int4", "auto", "bfloat16"):
        changed = with_dtype(asked, dtype)
        assert changed == asked.model_copy(update={"dtype": dtype})
    for dtype in ("float32", "float16"):
        assert with_dtype(asked, dtype) == EngineSettings(dtype=dtype)
    whole = EngineSettings(group_size=32, activation_bits=8, dtype="int8")
    assert with_dtype(whole, "bfloat16") == EngineSettings(dtype="bfloat16")


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"dtype": "int8"}, "int8 (attention g32)"), ({"dtype": "int4", "group_size": 32}, "int4-g32 (LM head int8-g32)")],
)  # fmt: skip
def test_backend_and_log_name_the_formats(tiny_bfloat16, fields, name, caplog):
    caplog.set_level(logging.INFO, "sparserve")
    layers = []
    built = assemble_engine(
        tiny_bfloat16,
        EngineSettings(kv_cache_gib=0.01, threads=1, **fields),
        on_layer=lambda done, total: layers.append((done, total)),
    )
    assert built.engine.backend.info.dtype == name
    assert f"parameters in {name}, backend cpu" in caplog.text
    assert layers == [(1, 2), (2, 2)]


def test_nothing_is_told_of_layers_that_stay_as_they_are(tiny_bfloat16):
    layers = []
    settings = EngineSettings(kv_cache_gib=0.01, threads=1)
    assemble_engine(tiny_bfloat16, settings, on_layer=lambda *step: layers.append(step))
    assert layers == []


@pytest.fixture(scope="module")
def compressed(write_tiny_checkpoint, write_compressed, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    source = write_tiny_checkpoint(folder / "tiny", dtype=torch.bfloat16)
    int4 = MatrixFormat(4, 32, rank=32)
    write_compressed(source, DecoderFormats(int4, int4, int4, MatrixFormat(8, 64)), folder / "out")
    return folder / "out"


def test_a_compressed_model_is_served_as_it_is(compressed, caplog):
    caplog.set_level(logging.INFO, "sparserve")
    settings = EngineSettings(model=str(compressed), kv_cache_gib=0.01, threads=1)
    layers = []
    built = build_engine(settings, on_layer=lambda *step: layers.append(step))
    name = "int4-g32 (LM head int8, low-rank terms of rank 32)"
    assert built.engine.backend.info.dtype == name
    assert f"parameters in {name}, backend cpu" in caplog.text
    assert f"model out was made of tiny at {compressed.parent / 'tiny'} (hash " in caplog.text
    assert layers == []
    model = load_by_settings(settings)
    assert format_name(model, settings) == name
    (decoder,) = make_decoders(model, settings, ["portable"])
    assert str(decoder.formats) == name


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "bfloat16"}, {"dtype": "int4"}, {"dtype": "int8", "group_size": 32},
        {"lm_head_dtype": "int8"}, {"mlp_dtype": "int4", "weight_planes": "3+1"},
    ],
    ids=str,
)  # fmt: skip
def test_a_compressed_model_has_formats_of_its_own(compressed, fields):
    name = next(iter(fields))
    told = rf"{name} is {fields[name]}, and {compressed} was compressed to int4-g32 \(.*leave {name} out, .* tiny"
    with pytest.raises(ConfigError, match=told):
        build_engine(EngineSettings(model=str(compressed), **fields))


def test_a_compressed_model_in_floating_point(compressed):
    for dtype in ("float32", "auto"):
        settings = EngineSettings(
            model=str(compressed), backend="reference", dtype=dtype, kv_cache_gib=0.01, threads=1
        )
        info = build_engine(settings).engine.backend.info
        assert (info.name, info.dtype) == (
            "reference",
            "float32" if dtype != "auto" else "bfloat16",
        )
