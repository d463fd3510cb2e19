"""`sparserve report`: formats, recipes, folders and policies of the tiny model in one grid."""

import json
import shutil
import sys

import pytest

from sparse_kernels.formats import DecoderFormats, MatrixFormat
from sparserve.bench import report_quality
from sparserve.bench.evaluation import Plan, evaluate_formats
from sparserve.bench.policies import parse_policies
from sparserve.config import EngineSettings
from sparserve.errors import ConfigError
from sparserve.model.loader import load_model
from sparserve.model.text import text_hash

SMALL = (
    "--threads", "1", "--kv-cache-gib", "0.01", "--rounds", "2", "--windows", "4", "--prompt-tokens", "40",
    "--decode-tokens", "8", "--context", "20", "--new-tokens", "4",
)  # fmt: skip
ROW = {
    "system", "label", "format", "recipe", "policy", "pruned", "healed", "bits_decoder", "bits_file", "kl", "kl_low", "kl_high", "top1",
    "perplexity", "density", "batch", "context", "new_tokens", "tokens_per_second", "tokens_per_second_low",
    "tokens_per_second_high", "rounds", "read_ceiling_gb_s", "percent_of_byte_bound", "ratio",
}  # fmt: skip
PLAIN = "name: plain\nquantizer: rtn\n"
FITTED = """
name: fitted
attention: {group_size: 32}
calibration: {windows: 4, tokens: 64}
"""


CUT = """
name: cut
attention: {group_size: 32}
prune: {mlp: 0.25, heads: 0.5}
calibration: {windows: 4, tokens: 64}
"""


def heal(folder, **healing):
    """Say so in a folder whose weights stay as they are."""
    file = folder / "compression.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"healing": healing}))


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSERVE_CACHE_DIR", str(tmp_path / "cache"))
    texts = {
        "wiki.txt": "A dog barked twice; nobody answered, for it was nearly midnight. " * 20,
        "seen.txt": "rivers and stones and birds that sing over green hills. " * 60,
        "plain.yaml": PLAIN,
        "fitted.yaml": FITTED,
        "cut.yaml": CUT,
    }
    for name, content in texts.items():
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.fixture
def report(run_main, tiny_folder, files):
    """`report(*flags)` -> (stdout, stderr, report.json), in files / out."""

    def run(*flags, expect=0):
        asked = ["report", files / "wiki.txt", "--model", tiny_folder, "--out", files / "out"]
        status, out, err = run_main(*asked, *SMALL, *flags)
        assert status == expect, err
        file = files / "out" / "report.json"
        return out, err, json.loads(file.read_text()) if file.exists() else None

    return run


@pytest.fixture
def evaluated(monkeypatch):
    """(model, formats, policies) of everything that is scored."""
    asked = []

    def watch(settings, plan, *more):
        asked.append((settings.model.rsplit("/", 1)[-1], *plan.formats, *map(str, plan.policies)))
        return evaluate_formats(settings, plan, *more)

    monkeypatch.setattr(report_quality, "evaluate_formats", watch)
    return asked


def test_a_grid_of_formats_recipes_and_policies(
    report, files, tiny_folder, write_compressed, evaluated
):
    formats = DecoderFormats(*[MatrixFormat(8, 64)] * 2, MatrixFormat(8, 64), MatrixFormat(8, 64))
    write_compressed(tiny_folder, formats, files / "mine")
    recipes = f"none,{files / 'plain.yaml'},{files / 'fitted.yaml'},{files / 'mine'}"
    flags = [
        "--recipes",
        recipes,
        "--compress-text",
        files / "seen.txt",
        "--formats",
        "bfloat16,int8",
    ]
    flags += [
        "--policies",
        "dense,core:0.5,exact/draft=ngram",
        "--baseline",
        "int8",
        "--tiers",
        "0.001,9",
    ]
    out, err, found = report(*flags)
    rows = found["rows"]
    names = ["bfloat16", "int8", "plain", "fitted", "mine"]
    assert [row["label"] for row in rows] == [
        label for name in names for label in (name, f"{name} core:0.5", f"{name} exact/draft=ngram")
    ]
    assert all(set(row) == ROW for row in rows)
    by_label = {row["label"]: row for row in rows}
    assert [by_label[name]["recipe"] for name in names] == [None, None, *names[2:]]
    # Groups of 32 or 64 columns have a scale in 16 and a zero in 8 bits.
    attention, mlp = 2 * (64 + 32) * 64, 3 * 96 * 64
    part = attention / (attention + mlp)
    expected = [16, 8.375 + 0.375 * part, 4.375, 4.375 + 0.375 * part, 8.375]
    assert [by_label[name]["bits_decoder"] for name in names] == pytest.approx(expected, abs=1e-3)
    assert by_label["mine"]["bits_file"] > by_label["mine"]["bits_decoder"]  # the embedding's 16
    for row in rows:
        assert 0 < row["kl_low"] <= row["kl"] <= row["kl_high"]
        assert len(row["rounds"]) == 2
        assert row["tokens_per_second_low"] == min(row["rounds"]) > 0
    assert by_label["int8 exact/draft=ngram"]["kl"] == by_label["int8"]["kl"]
    assert by_label["plain"]["kl"] > by_label["int8"]["kl"] > by_label["bfloat16"]["kl"]
    assert by_label["int8"]["ratio"] == 1
    assert {(row["pruned"], row["healed"]) for row in rows} == {(0, None)}
    assert [(tier["kl"], tier["peer"], tier["ratio"]) for tier in found["tiers"]] == [
        (0.001, None, None),
        (9, None, None),
    ]
    assert str(files) not in json.dumps(found)
    assert found["command"].startswith("sparserve report wiki.txt --model tiny-llama")
    assert "none,plain.yaml,fitted.yaml,mine --compress-text seen.txt" in found["command"]
    assert (files / "out" / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (files / "out" / "report.md").read_text().count("\n|") >= len(rows) + 5
    assert "| sparserve int8 core:0.5 |" in out

    # What is there is neither compressed nor scored again; what is new is.
    assert len(evaluated) == len(names)
    before = {path: path.stat().st_mtime_ns for path in (files / "out" / "models").rglob("*.*")}
    assert before
    flags[flags.index("bfloat16,int8")] = "int8,float32"
    _, err, again = report(*flags)
    assert "12 of 15 rows of quality were measured before" in " ".join(err.split())
    assert [own[1:] for own in evaluated[len(names) :]] == [("float32", "dense", "core:0.5")]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [r["kl"] for r in again["rows"][:3]] == [r["kl"] for r in rows[3:6]]
    (files / "wiki.txt").write_text("Another text, of which nothing is known yet. " * 40)
    _, err, _ = report("--formats", "int8")
    assert "measured before" not in err


def test_what_is_pruned_and_healed_stands_beside_what_is_not(
    report, files, tiny_folder, write_compressed
):
    _, _, found = report(
        "--formats", "none", "--recipes", files / "cut.yaml", "--compress-text", files / "seen.txt"
    )
    (cut,) = found["rows"]
    assert (cut["healed"], cut["policy"]) == (None, "dense")
    # Both folders name the original, whatever was done to it meanwhile; one has nothing rounded, and
    # biases that the original lacks, which do not count.
    again, whole = files / "again", files / "whole"
    shutil.copytree(files / "out" / "models" / "cut", again)
    heal(again, through="core:0.5", tokens=4000)
    write_compressed(tiny_folder, DecoderFormats(*[MatrixFormat()] * 4), whole, biases=("down",))
    heal(whole, through="dense")
    out, _, found = report(
        "--formats", "bfloat16", "--recipes", f"{again},{whole}", "--policies", "dense,core:0.5", "--tiers", "99"
    )  # fmt: skip
    rows = {row["label"]: row for row in found["rows"]}
    model, left = load_model(str(tiny_folder)).config, load_model(str(again)).config
    biases = sum((left.output_bias, left.down_bias)) * model.num_layers * model.hidden_size
    share = 1 - (left.num_parameters - biases) / model.num_parameters  # added ones do not count
    assert share > 0.1
    assert [(row["pruned"], row["healed"]) for row in rows.values()] == [
        *2 * [(0, None)], *2 * [(pytest.approx(share, abs=1e-6), "core:0.5")], *2 * [(0, "dense")]
    ]  # fmt: skip
    assert rows["again"]["kl"] == cut["kl"]
    # Bits are of the original's weights, of which a quarter or a half is not there.
    assert rows["whole"]["bits_decoder"] == 16
    assert 0.5 * 4.5 < rows["again"]["bits_decoder"] < 0.75 * 4.75
    stored = load_model(str(again), dtype="bfloat16", layers_at_use=True).compressed.info
    stays = left.num_parameters / model.num_parameters
    assert rows["again"]["bits_file"] == pytest.approx(stays * stored.bits_per_weight, abs=1e-3)
    (tier,) = found["tiers"]
    fastest = {
        what: max(own, key=lambda label: rows[label]["tokens_per_second"])
        for what, own in {
            "pruned": ["again", "again core:0.5"],
            "not healed": ["bfloat16", "bfloat16 core:0.5"],
            "sparse": [label for label in rows if label.endswith("core:0.5")],
        }.items()
    }
    assert tier["pruning"]["with"] == fastest["pruned"]
    assert tier["healing"]["without"] == fastest["not healed"]
    assert tier["sparsity"]["with"] == fastest["sparse"]
    assert all(tier[what]["ratio"] > 0 for what in ("sparsity", "pruning", "healing"))
    assert f"| {share:.1%} | core:0.5 |" in out
    assert "| 99 | healing | " in out


def test_an_interrupted_report_goes_on_where_it_stopped(report, monkeypatch, evaluated):
    flags = ["--formats", "bfloat16,int8,int4", "--policies", "dense,core:0.5"]
    watched = report_quality.evaluate_formats

    def interrupted(settings, plan, *more):
        if "int4" in plan.formats:
            raise ConfigError("the power went off")
        return watched(settings, plan, *more)

    monkeypatch.setattr(report_quality, "evaluate_formats", interrupted)
    _, err, found = report(*flags, expect=1)
    assert "the power went off" in err
    assert found is None
    monkeypatch.setattr(report_quality, "evaluate_formats", watched)
    _, err, found = report(*flags)
    assert "4 of 6 rows of quality were measured before" in " ".join(err.split())
    assert [own[1] for own in evaluated] == ["bfloat16", "int8", "int4"]
    assert len(found["rows"]) == 6


def test_kl_is_that_of_eval(report, files, tiny_folder):
    _, _, found = report("--formats", "int8", "--policies", "dense,core:0.5")
    settings = EngineSettings(model=str(tiny_folder), threads=1, kv_cache_gib=0.01)
    policies = parse_policies("dense,core:0.5")
    plan = Plan(files / "wiki.txt", ["int8"], policies, None, 4, 40, 8)

    def load(name, dtype):
        return load_model(name, dtype="bfloat16" if dtype == "auto" else dtype)

    rows = evaluate_formats(settings, plan, load, lambda *_: None)
    assert [(r["kl"], r["top1"]) for r in found["rows"]] == [(row.kl, row.top1) for row in rows]


def test_each_weights_take_the_index_that_fits_them(report, index_file, caplog):
    index = index_file("float32")
    flags = ["--policies", "dense,token:0.7/gate"]
    _, _, found = report("--formats", "float32,bfloat16", "--index", index, *flags)
    labels = [row["label"] for row in found["rows"]]
    assert labels == ["float32", "float32 token:0.7/gate", "bfloat16"]
    assert "bfloat16 token:0.7/gate is left out" in caplog.text
    _, err, _ = report("--formats", "bfloat16", "--index", index, *flags, expect=1)
    assert "of --index fits none of what is measured" in err
    flags += ["--baseline", "bfloat16 token:0.7/gate"]
    _, err, _ = report("--formats", "float32,bfloat16", "--index", index, *flags, expect=1)
    assert "is not measured; there are: float32, float32 token:0.7/gate, bfloat16" in err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--recipes", "fest"], "there is no recipe 'fest'"),
        (["--recipes", "fast"], "the recipe fast needs a text to measure inputs on"),
        (["--recipes", "fast", "--compress-text", "wiki.txt"], "the recipe was calibrated on"),
        (["--recipes", "fast", "--compress-text", "none.txt"], "cannot be read as UTF-8 text"),
        (["--recipes", "fast,fast2.yaml", "--compress-text", "seen.txt"], "2 systems would be named 'fast'"),
        (["--compress-text", "seen.txt"], "--compress-text is for recipes"),
        (["--recipes", "."], "is a folder, and not of a model that was compressed"),
        (["--recipes", "other"], "other was made of other-llama with hash"),
        (["--recipes", "damaged"], "damaged/layers has the files of 1 layers, and config.json asks for 2"),
        (["--recipes", "wordless"], "healing.through is 5, and must say in words"),
        (["--model", "int8"], "give that as --model, and this with --recipes"),
        (["--recipes", "known"], "the model known was calibrated on"),
        (["--out", "wiki.txt/out"], "quality.json cannot be written"),
        (["--peers", "llama.cpp:Q4_0"], "package llama-cpp-python: pip install"),
        (["--peers", "transformers:float32"], "transformers is not scored"),
        (["--formats", "int3"], "no format is named int3"),
        (["--formats", "none"], "nothing is to be measured"),
        (["--policies", "cor:0.5"], "policy 'cor:0.5' begins with"),
        (["--baseline", "int4"], "--baseline 'int4' is not measured; there are: bfloat16"),
        (["--tiers", "0.1,0"], "--tiers is '0.1,0': '0' is no KL"),
        (["--compress", "fast", "--compress-text", "seen.txt"], "here give --recipes"),
        (["--recipes", "fast", "--compress-text", "seen.txt"], "24 were asked for"),
        (["--recipes", "plain.yaml,high.yaml"], "and q, k, v of this model have rank 64 at most"),
        (["--recipes", "plain.yaml,heals.yaml"], "the recipe heals heals, which takes long: follow it once"),
        (["--recipes", "plain.yaml", "--weight-planes", "4+4", "--formats", "int4"], "take --weight-planes whole"),
        (["--windows", "400"], "400 were asked for"),
        (["--context", "600"], "604 tokens of prompt and output exceed"),
        (["--max-running", "4"], "--max-running: the engine is made for the prompts"),
    ],
)  # fmt: skip
def test_what_cannot_be_reported_is_told_before_anything_is_measured(
    report,
    files,
    tiny_folder,
    write_tiny_checkpoint,
    write_compressed,
    monkeypatch,
    evaluated,
    flags,
    told,
):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.chdir(files)
    (files / "fast2.yaml").write_text(FITTED.replace("fitted", "fast"))
    high = "{bits: 4, rank: 96}"
    (files / "high.yaml").write_text(
        f"name: high\nquantizer: rtn\ncompensate: lorc\nattention: {high}\n"
    )
    (files / "heals.yaml").write_text("name: heals\nquantizer: rtn\nheal: {after_rounding: true}\n")
    folder = files / flags[-1]
    if folder.name in ("other", "known", "damaged", "wordless", "int8"):
        formats = DecoderFormats(*[MatrixFormat(8, 64)] * 4)
        own = tiny_folder
        if folder.name == "other":
            own = write_tiny_checkpoint(files / "other-llama", seed=7)
        seen = text_hash((files / "wiki.txt").read_bytes())
        write_compressed(own, formats, folder, texts=(seen,) if folder.name == "known" else ())
        if folder.name == "damaged":
            (folder / "layers" / "00001.safetensors").unlink()
        if folder.name == "wordless":
            heal(folder, through=5)
    _, err, found = report("--formats", "bfloat16", *flags, expect=1)
    assert told in " ".join(err.split())
    assert found is None
    assert evaluated == []
    assert not (files / "out" / "models").exists()


def test_a_folder_of_another_recipe_is_not_taken_for_this_one(report, files):
    flags = ["--formats", "none", "--recipes", files / "plain.yaml"]
    report(*flags)
    (files / "plain.yaml").write_text(PLAIN + "down: {bits: 8}\n")
    _, err, _ = report(*flags, expect=1)
    assert "was compressed by another recipe named plain" in " ".join(err.split())
