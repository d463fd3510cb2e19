"""Peers in the grid of `sparserve report`."""

import json
import sys

import pytest
from typer.testing import CliRunner

from sparserve.cli import app


def test_peers_stand_in_the_same_grid(mergeable_folder, tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp")
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("A text that is long enough for a few windows of it. " * 8)
    arguments = [
        "report", str(text), "--model", str(mergeable_folder), "--formats", "bfloat16,int8", "--peers",
        "llama.cpp:Q4_0,llama.cpp", "--windows", "5", "--prompt-tokens", "40", "--decode-tokens", "12",
        "--context", "20", "--new-tokens", "4", "--rounds", "3", "--batch", "2", "--threads", "1", "--baseline",
        "llama.cpp Q8_0", "--tiers", "9", "--out", str(out),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["sparserve", *arguments])
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    rows = {row["label"]: row for row in report["rows"]}
    labels = ["bfloat16", "int8", "llama.cpp Q4_0", "llama.cpp bfloat16", "llama.cpp Q8_0"]
    assert list(rows) == labels
    assert [rows[label]["system"] for label in labels] == 2 * ["sparserve"] + 3 * ["llama.cpp"]
    bits = [rows[label]["bits_decoder"] for label in labels]
    # llama.cpp rounds rows of 32 columns at least, and keeps what is shorter.
    assert bits == pytest.approx([16, 8.525, 4.5, 16, 8.5])
    assert rows["llama.cpp Q8_0"]["ratio"] == 1
    assert {row["batch"] for row in rows.values()} == {2}
    fastest = max(labels[2:], key=lambda label: rows[label]["tokens_per_second"])
    assert report["tiers"][0]["peer"] == fastest
    assert report["tiers"][0]["ratio"] > 0
    assert "| llama.cpp Q4_0 |" in (out / "report.md").read_text()
