"""Which weights and settings each of our formats is measured with."""

from dataclasses import replace

import pytest

from sparserve.bench import formats as measured_module
from sparserve.bench.formats import measure_formats
from sparserve.bench.peers.registry import PeerSpec
from sparserve.bench.policies import parse_policies
from sparserve.bench.sweep import Plan
from sparserve.config import EngineSettings
from sparserve.errors import ConfigError
from sparserve.model.calibration import CALIBRATION_TEXT
from sparserve.model.loader import load_model

PLAN = Plan("decode", [1], [20], 4, rounds=1)
SETTINGS = EngineSettings(threads=1, kv_cache_gib=0.01)


@pytest.fixture
def measured(tiny_folder):
    """`measured(formats, peers)` -> (report, data types that weights were loaded in)."""

    def measure(formats, peers=(), policies="dense", text=""):
        loaded = []

        def load(dtype):
            loaded.append(dtype)
            return load_model(str(tiny_folder), dtype="bfloat16" if dtype == "auto" else dtype)

        plan, specs = replace(PLAN, text=str(text)), parse_policies(policies)
        return measure_formats(SETTINGS, plan, formats, specs, peers, load, lambda *_: None), loaded

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


@pytest.fixture
def prompts(monkeypatch):
    """Of each round, those that systems were run with."""
    given = []
    run_sweep = measured_module.run_sweep

    def watch(ours, peers, plan, *, prompts, **more):
        def asked(source, count, length):
            given.append(prompts(source, count, length))
            return given[-1]

        return run_sweep(ours, peers, plan, prompts=asked, **more)

    monkeypatch.setattr(measured_module, "run_sweep", watch)
    return given


def test_prompts_are_pieces_of_a_text_where_neurons_are_chosen_or_one_is_given(
    measured, prompts, tmp_path, tiny_model
):
    text = tmp_path / "text"
    text.write_text("abc")

    def words(tokens):
        return tiny_model.tokenizer.decode(list(tokens))

    report, _ = measured(["float32"], policies="dense,core:0.5")
    assert [row.policy for row in report.rows] == ["dense", "core:0.5"]
    assert all(words(piece) in 2 * CALIBRATION_TEXT for (piece,) in prompts)
    del prompts[:]
    measured(["float32"], policies="dense", text=text)
    assert all(words(piece) in 8 * "abc" for (piece,) in prompts)
    del prompts[:]
    measured(["float32"], policies="dense")
    assert all(words(piece) not in 2 * CALIBRATION_TEXT for (piece,) in prompts)
    text.write_text("")
    with pytest.raises(ConfigError, match="the file of --text is empty"):
        measured(["float32"], policies="dense", text=text)
