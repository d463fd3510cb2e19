"""Which weights and settings each of our formats is measured with."""

import dataclasses

import pytest

from sparserve.bench import formats
from sparserve.bench.peers.registry import PeerSpec
from sparserve.bench.sweep import Plan
from sparserve.config import EngineSettings
from sparserve.engine.factory import assemble_engine

PLAN = Plan("decode", [1], [20], 4, rounds=1)
SETTINGS = EngineSettings(threads=1, kv_cache_gib=0.01)


@pytest.fixture
def made(monkeypatch):
    """Data types that engines were made in; what is quantized counts as if it were."""
    asked = []

    def assemble(model, settings):
        asked.append(settings.dtype)
        built = assemble_engine(model, settings.model_copy(update={"dtype": "auto"}))
        backend = built.engine.backend
        backend.info = dataclasses.replace(backend.info, dtype=settings.dtype)
        return built

    monkeypatch.setattr(formats, "assemble_engine", assemble)
    return asked


def test_quantized_formats_are_made_of_the_checkpoints_own_weights(made, tiny_model):
    loaded = []

    def load(dtype):
        loaded.append(dtype)
        return tiny_model

    report = formats.measure_formats(
        SETTINGS, PLAN, ["int8", "int4"], [PeerSpec("transformers")], load, lambda *_: None
    )
    assert made == ["int8", "int4"]
    assert loaded == ["auto"]
    assert [row.format for row in report.rows] == ["int8", "int4"]  # transformers has neither
    assert report.ratios == []


def test_the_checkpoints_own_data_type_is_measured_once(made, tiny_model):
    report = formats.measure_formats(
        SETTINGS, PLAN, ["auto", "float32"], [], lambda dtype: tiny_model, lambda *_: None
    )
    assert made == ["float32"]
    assert [row.format for row in report.rows] == ["float32"]
