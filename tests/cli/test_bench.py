"""`sparserve bench`: its reports, pictures and what it refuses."""

import json
import os

import pytest

from sparse_kernels.native import usable_cpus

TINY = ("--threads", "1", "--kv-cache-gib", "0.01", "--rounds", "2")
ROW = {
    "system", "model", "format", "policy", "batch", "context", "new_tokens", "tokens_per_second",
    "tokens_per_second_low", "tokens_per_second_high", "read_ceiling_gb_s",
    "byte_bound_tokens_per_second", "percent_of_byte_bound", "bytes_per_token", "density", "union",
    "share_of_allowed_time", "against_dense",
}  # fmt: skip


@pytest.fixture
def bench(run_main, tiny_folder, tmp_path):
    """`bench("decode", …)` -> (exit status, stdout, stderr, the JSON report)."""

    def run(command: str, *flags: str, expect: int = 0):
        file = tmp_path / "report.json"
        status, out, err = run_main(
            "bench", command, "--model", tiny_folder, *TINY, "--json", file, *flags
        )
        assert status == expect, err
        return out, err, json.loads(file.read_text()) if file.exists() else None

    return run


def test_decode_reports_every_system_at_every_point(bench, tmp_path):
    picture = tmp_path / "decode.png"
    out, _, report = bench(
        "decode", "--formats", "float32,auto,bfloat16", "--batch", "1,3", "--context", "40",
        "--new-tokens", "6", "--png", str(picture),
    )  # fmt: skip
    rows = report["rows"]
    assert all(set(row) == ROW for row in rows)
    assert [(r["batch"], r["context"], r["system"], r["format"]) for r in rows] == [
        (batch, 40, system, format)
        for batch in (1, 3)
        for system in ("sparserve", "transformers")
        for format in ("float32", "bfloat16")
    ]
    for row in rows:
        low, high = row["tokens_per_second_low"], row["tokens_per_second_high"]
        assert 0 < low <= row["tokens_per_second"] <= high
        assert row["read_ceiling_gb_s"] > 0.1
        assert row["byte_bound_tokens_per_second"] > high
        assert row["percent_of_byte_bound"] < 100
    assert {r["ratio"] > 0 for r in report["ratios"]} == {True}
    assert len(report["ratios"]) == 2 * 2
    assert report["backends"].keys() == {"float32", "bfloat16"}
    assert report["backends"]["float32"] == "reference"
    assert report["plan"]["rounds"] == 2
    assert 0 <= report["cpus_used_by_others"] <= os.cpu_count()
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.stat().st_size > 10_000
    assert "of bound" in out
    assert "batch 3, context 40: float32" in out


def test_policies_are_measured_beside_dense(bench, tmp_path):
    text, picture = tmp_path / "text", tmp_path / "decode.png"
    text.write_text(
        "".join(f"Line {i} has {i * i} words, {7 * i % 5} of them long.\n" for i in range(9))
    )
    flags = ["--formats", "float32,bfloat16", "--policies", "dense,core:0.5", "--batch", "1,3"]
    flags += ["--context", "40", "--new-tokens", "6", "--peers", "none", "--png", str(picture)]
    out, _, report = bench("decode", *flags, "--text", str(text))
    rows = report["rows"]
    assert all(set(row) == ROW for row in rows)
    assert [(r["batch"], r["format"], r["policy"]) for r in rows] == [
        (batch, format, policy)
        for batch in (1, 3)
        for format in ("float32", "bfloat16")
        for policy in ("dense", "core:0.5")
    ]
    for dense, core in zip(rows[::2], rows[1::2], strict=True):
        assert (dense["density"], dense["union"], core["density"]) == (1, 1, 0.5)
        assert dense["share_of_allowed_time"] is dense["against_dense"] is None
        assert core["against_dense"] > 0
        assert core["share_of_allowed_time"] is not None
        assert core["bytes_per_token"] < dense["bytes_per_token"]
        assert (core["union"] == 0.5) == (core["batch"] == 1)
    assert picture.stat().st_size > 10_000
    assert "against the same format dense" in out


def test_integers_are_measured_beside_bfloat16(bench):
    flags = ["--batch", "1", "--context", "40", "--new-tokens", "4", "--peers", "none"]
    _, _, report = bench("decode", "--formats", "bfloat16,int4", "--activation-bits", "8", *flags)
    integers = "int4 (attention g32, LM head int8, 8-bit activations)"
    assert [row["format"] for row in report["rows"]] == ["bfloat16", integers]
    assert report["backends"] == {"bfloat16": "cpu", integers: "cpu"}


def test_prefill_reports_prompt_tokens(bench):
    out, _, report = bench("prefill", "--prompt-tokens", "16,64", "--peers", "none")
    assert [(row["context"], row["new_tokens"]) for row in report["rows"]] == [(16, 1), (64, 1)]
    assert report["plan"]["phase"] == "prefill"
    assert report["ratios"] == []
    assert "prefill" in out


def test_engine_reports_whole_generations(bench):
    flags = ["--prompt-tokens", "20", "--new-tokens", "6", "--concurrency", "3"]
    flags += ["--dtype", "float32", "--conversation-tokens", "60"]
    out, _, report = bench("engine", *flags)
    rows = [(row["system"], row["batch"]) for row in report["rows"]]
    assert rows == [("sparserve", 1), ("transformers", 1), ("sparserve", 3)]
    assert all(row["tokens_per_second"] > 0 for row in report["rows"])
    assert report["speed_against_peers"].keys() == {"transformers:float32"}
    assert report["conversation"]["second_turn_tokens"] == 60 + 88
    assert "3 at once against 3 in sequence" in out


def test_kernels_reports_every_phase_of_every_step(bench, tmp_path):
    picture = tmp_path / "kernels.png"
    out, _, report = bench(
        "kernels", "--levels", "portable", "--batch", "1,3", "--context", "40", "--prefill", "64",
        "--png", str(picture), "--dtype", "int8",
    )  # fmt: skip
    phases = ["qkv", "attention", "output", "mlp", "head", "candidates", "step"]
    rows = report["rows"]
    assert [(r["step"], r["batch"], r["context"], r["phase"]) for r in rows] == [
        (*step, phase)
        for step in (("decode", 1, 40), ("decode", 3, 40), ("prefill", 1, 64))
        for phase in phases
    ]
    for row in rows:
        assert row["level"] == "portable"
        assert row["milliseconds"] > 0
        assert (row["bytes"] > 0) == (row["phase"] != "candidates")  # what those read is in a cache
    assert report["read_ceiling_gb_s"] > 0.1
    assert report["plan"]["rounds"] == 2
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert report["format"] == "int8 (attention g32)"
    for word in (
        ", int8 (attention g32): decode, batch 3",
        "prompt of 64",
        "portable, ms",
        "% of ceiling",
        "GFLOP/s",
    ):
        assert word in out


def test_memory_is_told_at_every_stage(run_main, tiny_folder, tmp_path):
    asked = ["--model", tiny_folder, "--threads", "1", "--formats", "float32,bfloat16"]
    asked += ["--batch", "2", "--context", "100", "--new-tokens", "4"]
    status, out, err = run_main("bench", "memory", *asked, "--json", tmp_path / "m.json")
    assert status == 0, err
    report = json.loads((tmp_path / "m.json").read_text())
    rows = report["rows"]
    assert [(row["system"], row["format"]) for row in rows] == [
        ("sparserve", "float32"),
        ("sparserve", "bfloat16"),
    ]
    for row, number_bytes in zip(rows, (4, 2), strict=True):
        # 7 KV blocks of 16 positions for each of 2 sequences; 2 layers, 2 heads of 16 numbers
        assert row["kv_bytes"] == 2 * 7 * 16 * (2 * 2 * 2 * 16 * number_bytes)
        parameters = 2 * 259 * 64 + 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 96 * 64)
        assert number_bytes * parameters <= row["weight_bytes"] < 1.5 * number_bytes * parameters
        assert row["source_bytes"] == (tiny_folder / "model.safetensors").stat().st_size
        imported, loaded, served = (row[stage] for stage in ("imported", "loaded", "served"))
        assert 50e6 < imported["total"] < loaded["total"] <= loaded["peak"] <= served["peak"]
        for stage in (imported, loaded, served):
            assert stage["total"] == stage["anonymous"] + stage["file"]
    assert report["plan"] == {"batch": 2, "context": 100, "new_tokens": 4, "seed": 0}
    assert (report["serving_beyond_bytes"], report["loading_sources"]) == (450_000_000, 1.3)
    for word in ("weights", "450 MB serving", "1.3 x"):
        assert word in " ".join(out.split())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--peers", "transformers"], "the memory of transformers is not measured"),
        (["--kv-cache-gib", "1"], "--kv-cache-gib: the engine is made for"),
        (["--context", "500"], "516 tokens of prompt and output exceed"),
        (
            ["--dtype", "float32", "--backend", "cpu", "--context", "20"],
            "sparserve could not be measured: the cpu",
        ),
    ],
)
def test_memory_that_cannot_be_measured_is_refused(run_main, tiny_folder, flags, told):
    status, _, err = run_main("bench", "memory", "--model", tiny_folder, "--threads", "1", *flags)
    assert status == 1
    assert told in err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--levels", "sse"], "no level of the instruction set is named 'sse'"),
        (["--dtype", "float32"], "the cpu backend cannot be used: dtype is float32"),
        (["--device", "cuda"], "device is cuda, and this measures a CPU; leave --device out"),
        (["--prefill", "513"], "513 tokens exceed the model's context of 512"),
        (["--max-running", "4"], "--max-running: the engine is made for"),
        (["--png", "x.docx"], "x.docx is no name of a picture"),
    ],
)
def test_kernels_that_cannot_be_measured_are_refused(run_main, tiny_folder, flags, told):
    status, _, err = run_main("bench", "kernels", "--model", tiny_folder, "--threads", "1", *flags)
    assert status == 1
    assert told in err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--threads", str(usable_cpus() + 1)], f"more than the {usable_cpus()} CPUs"),
        (["--context", "500", "--new-tokens", "13"], "513 tokens of prompt and output exceed"),
        (["--formats", "int3"], "no format is named int3; there are: auto, float32"),
        (["--peers", "vllm"], "no peer is named 'vllm'"),
        (["--batch", "1,0"], "--batch is '1,0': '0' is no whole number from 1 on"),
        (["--context", "12a"], "--context is '12a'"),
        (["--max-running", "4"], "--max-running: the engine is made for the prompts"),
        (["--json", "/no/such/folder/x"], "the folder of --json"),
        (["--png", "/no/such/folder/x.png"], "the folder of --png"),
        (["--text", "/no/such/text"], "/no/such/text cannot be read as UTF-8 text"),
        (["--policies", "core"], "policy 'core' begins with 'core'"),
        (["--context", "40", "--policies", "token:0.5"], "needs a calibrated index"),
        (
            ["--batch", "80", "--context", "500", "--new-tokens", "12"],
            "sequences of 512 tokens need",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(run_main, tiny_folder, flags, told):
    few = ["--kv-cache-gib", "0.01", "--peers", "none", "--dtype", "float32"]
    status, _, err = run_main("bench", "decode", "--model", tiny_folder, *few, *flags)
    assert status == 1
    assert told in err


def test_one_new_token_leaves_nothing_to_decode(run_main, tiny_folder):
    status, _, err = run_main("bench", "decode", "--model", tiny_folder, "--new-tokens", "1")
    assert status == 2
    assert "--new-tokens" in err


def test_a_picture_needs_a_format_that_can_be_drawn(run_main, tiny_folder, tmp_path):
    asked = ["--model", tiny_folder, "--png", tmp_path / "x.docx"]
    status, _, err = run_main("bench", "decode", *asked)
    assert status == 1
    assert "x.docx is no name of a picture; one ends in .png" in err


def test_engine_serves_the_same_as_streams(bench):
    flags = ["--prompt-tokens", "20", "--new-tokens", "6", "--concurrency", "3", "--peers", "none"]
    out, _, report = bench("engine", *flags, "--conversation-tokens", "0", "--served")
    rows = [(row["system"], row["batch"]) for row in report["rows"]]
    assert rows == [("sparserve", 1), ("sparserve", 3), ("sparserve, served", 3)]
    assert report["served_against_offline"] > 0
    assert "3 streams over gRPC against offline" in out


def test_speed_against_quality_is_drawn(run_main, tmp_path):
    both = {"system": "sparserve", "format": "int8", "policy": "dense"}
    quality, decode, picture = (tmp_path / name for name in ("q.json", "d.json", "q.png"))
    quality.write_text(json.dumps([{**both, "kl": 0.1, "kl_low": 0.1, "kl_high": 0.2}]))
    speeds = {f"tokens_per_second{end}": 9.0 for end in ("", "_low", "_high")}
    timed = {**both, "model": "tiny", "batch": 1, "context": 8, **speeds}
    other = {**timed, "format": "int4"}
    decode.write_text(json.dumps({"rows": [timed, other]}))
    status, _, err = run_main("bench", "plot-quality", quality, decode, "--png", picture)
    assert status == 0, err
    assert "sparserve int4 dense has a speed or a KL, not both" in err
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    status, _, err = run_main("bench", "plot-quality", quality, "--png", picture)
    assert (status, "no report of sparserve bench decode" in err) == (1, True)
