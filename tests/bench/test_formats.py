"""Which weights and settings each of our formats is measured with."""

import pytest

from sparserve.bench.formats import measure_formats
from sparserve.bench.peers.registry import PeerSpec
from sparserve.bench.sweep import Plan
from sparserve.config import EngineSettings
from sparserve.model.loader import load_model

PLAN = Plan("decode", [1], [20], 4, rounds=1)
SETTINGS = EngineSettings(threads=1, kv_cache_gib=0.01)


@pytest.fixture
def measured(tiny_folder):
    """`measured(formats, peers)` -> (report, data types that weights were loaded in)."""

    def measure(formats, peers=()):
        loaded = []

        def load(dtype):
            loaded.append(dtype)
            return load_model(str(tiny_folder), dtype="bfloat16" if dtype == "auto" else dtype)

        report = measure_formats(SETTINGS, PLAN, formats, peers, load, lambda *_: None)
        return report, loaded

    return measure


def test_quantized_formats_are_made_of_the_checkpoints_own_weights(measured):
    report, loaded = measured(["int8", "int4"], [PeerSpec("transformers")])
    assert loaded == ["auto"]
    # transformers has neither
    assert [row.format for row in report.rows] == [
        "int8 (attention g32)",
        "int4 (attention g32, LM head int8)",
    ]
    assert report.ratios == []


def test_a_peer_runs_beside_the_formats_that_it_has(measured):
    report, loaded = measured(["int8", "bfloat16"], [PeerSpec("transformers")])
    assert loaded == ["auto", "bfloat16"]
    rows = [(row.system, row.format) for row in report.rows]
    assert rows == [
        ("sparserve", "int8 (attention g32)"),
        ("sparserve", "bfloat16"),
        ("transformers", "bfloat16"),
    ]
    assert [(r.format, r.peer_format) for r in report.ratios] == [("bfloat16", "bfloat16")]


def test_what_auto_stands_for_is_measured_once(measured):
    report, _ = measured(["auto", "bfloat16"])
    assert [row.format for row in report.rows] == ["bfloat16"]
