"""`sparserve bench pruning`: ways of pruning the tiny model, scored alike."""

import json

import pytest

from sparserve.bench.evaluation import Plan, evaluate_formats
from sparserve.bench.policies import parse_policies
from sparserve.compression.sections import Prune
from sparserve.config import EngineSettings
from sparserve.errors import ConfigError
from sparserve.model.loader import load_model
from sparserve.model.pruning import prune
from sparserve.model.text import read_windows

SMALL = (
    "--threads", "1", "--kv-cache-gib", "0.01", "--windows", "4", "--prompt-tokens", "40", "--decode-tokens", "8",
    "--calibration-windows", "4", "--calibration-tokens", "64", "--shares", "0.2",
)  # fmt: skip


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSERVE_CACHE_DIR", str(tmp_path / "cache"))
    scored, seen = tmp_path / "wiki.txt", tmp_path / "seen.txt"
    scored.write_text("A dog barked twice; nobody answered, for it was nearly midnight. " * 20)
    seen.write_text("rivers and stones and birds that sing over green hills. " * 60)
    return scored, seen


@pytest.fixture
def measured(run_main, tiny_folder, texts, tmp_path):
    """`measured(flags)` -> (status, stdout, stderr, the report)"""
    scored, seen = texts
    file = tmp_path / "grid.json"

    def run(*flags):
        status, out, err = run_main(
            "bench", "pruning", scored, "--model", tiny_folder, "--compress-text", seen, *SMALL, "--json", file, *flags
        )  # fmt: skip
        return status, out, err, json.loads(file.read_text()) if file.exists() else None

    return run


def test_every_way_of_the_grid_is_scored_as_eval_would(measured, texts, tiny_folder, tmp_path):
    flags = (
        "--criteria", "flap,random", "--restores", "none,least_squares", "--what", "together,mlp", "--png", tmp_path / "a.png"
    )  # fmt: skip
    status, out, err, report = measured(*flags)
    assert status == 0, err
    ways = [(r["what"], r["how"]["criterion"], r["how"]["allocation"], r["how"]["restore"]) for r in report["rows"]]  # fmt: skip
    assert len(set(ways)) == len(ways) == 16
    assert out.count("least_squares") == 8
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    last = report["rows"][7]
    assert last["how"]["ratio"] == 0.2
    model = load_model(str(tiny_folder), dtype="bfloat16", layers_at_use=True)
    token_ids = read_windows(model, [texts[1]], 4, 64).token_ids
    pruned = prune(model, Prune.model_validate(last["how"]), token_ids)
    assert last["removed"] == pruned.parameters / model.config.num_parameters
    exact = load_model(str(tiny_folder), dtype="float32")
    settings = EngineSettings(model="pruned", threads=1, kv_cache_gib=0.01)
    plan = Plan(texts[0], ["bfloat16"], parse_policies("dense"), "original", 4, 40, 8, cache=False)
    models = {"pruned": pruned.model, "original": exact}
    (quality,) = evaluate_formats(settings, plan, lambda name, dtype: models[name], lambda *_: None)
    assert last["quality"]["kl"] == quality.kl > 0


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--shares", "0.2,x"), "--shares has 'x'"),
        (("--shares", "1.5"), "--shares has 1.5; give shares between 0 and 1"),
        (("--criteria", "flap,best"), "--criteria has best; there are: amp, amp_w, wanda, flap"),
        (("--what", "norms"), "--what has norms; there are: neurons_first, together, heads, mlp"),
        (("--head-unit", "bogus"), "--head-unit has bogus; there are: groups, queries"),
        (
            ("--shares", "0.1,0.97"),
            "--shares with --what neurons_first is 0.97, and of this model at most",
        ),
        (("--calibration-windows", "4000"), "lower --calibration-windows or --calibration-tokens"),
        (("--calibration-tokens", "4000"), "lower --calibration-tokens"),
        (("--compress-text", ""), "give --compress-text"),
    ],
)
def test_what_cannot_be_tried_is_told(measured, flags, told):
    status, _, err, report = measured(*flags)
    assert status == 1
    assert told in " ".join(err.split())
    assert report is None


def test_the_text_that_is_scored_may_not_be_calibrated_on(measured, texts):
    status, _, err, _ = measured("--compress-text", texts[0])
    assert status == 1
    assert "is fitted to this text" in " ".join(err.split())


def test_rows_that_there_are_are_told_where_a_way_fails(measured, monkeypatch, tmp_path):
    def fails_later(model, how, *args, **options):
        if how.restore == "bias":
            raise ConfigError("no more")
        return prune(model, how, *args, **options)

    monkeypatch.setattr("sparserve.bench.pruning.prune", fails_later)
    picture = tmp_path / "a.png"
    status, out, err, report = measured(
        "--criteria", "flap", "--allocations", "uniform", "--restores", "none,bias", "--png", picture
    )  # fmt: skip
    assert status == 1
    assert "error: no more" in err
    assert len(report["rows"]) == 1
    assert "pruned, against the original" in out
    assert picture.exists()
