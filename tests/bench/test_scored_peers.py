"""Peers under the scorer: the same model in float32 is the original, formats are near it."""

import json
import sys

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from sparserve.bench.original import Original, original_states
from sparserve.bench.peers import packages
from sparserve.bench.peers.gguf_files import gguf_file, mlp_weight_bytes, step_weight_bytes
from sparserve.bench.quality import cut_windows, measure
from sparserve.bench.scored_peers import open_scored
from sparserve.cli import app
from sparserve.errors import ConfigError
from sparserve.model.loader import load_model

PROMPT, DECODE = 40, 12


@pytest.fixture(scope="module")
def windows():
    return cut_windows([i * 7 % 251 for i in range(400)], 5, PROMPT, DECODE)


@pytest.fixture
def scored(mergeable_folder, windows):
    """`scored(name, format)`: the peer's system and its row."""
    model = load_model(str(mergeable_folder), dtype="float32")
    original = Original(model, windows, original_states(model, windows, 1, None, lambda *_: None))

    def score(name: str, format: str, threads: int = 2):
        def load(dtype: str):
            return load_model(str(mergeable_folder), dtype=dtype)

        system = open_scored(name, format, load, windows, threads)
        return system, measure(original.logits, [system], windows, lambda *_: None, 2)[0]

    return score


def test_llama_cpp_in_float32_is_the_original_and_its_formats_are_near_it(scored, windows):
    pytest.importorskip("llama_cpp")
    rows = {name: scored("llama.cpp", name)[1] for name in ("float32", "bfloat16", "Q8_0", "Q4_0")}
    assert rows["float32"].kl < 1e-5  # its KV cache is float16
    assert rows["float32"].top1 > 0.95
    assert rows["float32"].kl < rows["bfloat16"].kl < rows["Q8_0"].kl < rows["Q4_0"].kl
    sizes = [row.bytes_per_token for row in rows.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert {row.system for row in rows.values()} == {"llama.cpp"}


@pytest.mark.parametrize("name", ["llama.cpp", "openvino"])
def test_a_window_is_scored_alike_whatever_came_before(scored, windows, name):
    pytest.importorskip("llama_cpp" if name == "llama.cpp" else "openvino_genai")
    system, _ = scored(name, "bfloat16")
    (alone,) = system.logits(windows[3:4])
    *_, again = system.logits(windows[:4])
    np.testing.assert_array_equal(alone, again)
    assert alone.shape == (DECODE, 264)


def test_openvino_is_near_the_original(scored):
    pytest.importorskip("openvino_genai")
    pytest.importorskip("llama_cpp")  # quantizes its files
    _, coarse = scored("openvino", "int8")
    _, fine = scored("openvino", "bfloat16")
    assert 0 < fine.kl < coarse.kl < 0.1
    assert fine.top1 > 0.9
    assert coarse.bytes_per_token < fine.bytes_per_token


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_of_the_file_but_the_embeddings(write_mergeable, tmp_path, tied):
    folder = write_mergeable(tmp_path / "source", tie_word_embeddings=tied)
    path = gguf_file(load_model(str(folder)), "bfloat16")
    hidden, mlp, vocab, layers = 64, 96, 264, 2
    attention = 2 * hidden * hidden + 2 * hidden * 32
    matrices = layers * (attention + 3 * hidden * mlp) + vocab * hidden  # the LM head once
    vectors = (2 * layers + 1) * hidden
    assert step_weight_bytes(path) == 2 * matrices + 4 * vectors
    assert mlp_weight_bytes(path) == 2 * layers * 3 * hidden * mlp
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert ("output.weight" in names) != tied


def test_the_command_puts_peers_beside_our_formats(mergeable_folder, tmp_path):
    pytest.importorskip("llama_cpp")
    text, report = tmp_path / "text", tmp_path / "report.json"
    text.write_text("A text that is long enough for a few windows of it. " * 8)
    result = CliRunner().invoke(
        app,
        [
            "eval", str(text), "--model", str(mergeable_folder), "--formats", "float32,bfloat16",
            "--peers", "llama.cpp:Q8_0,llama.cpp", "--windows", "5", "--prompt-tokens", "40",
            "--decode-tokens", "12", "--threads", "1", "--json", str(report),
        ],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = [
        (row["system"], row["format"], row["windows"]) for row in json.loads(report.read_text())
    ]
    assert rows == [
        ("sparserve", "float32", 5),
        ("sparserve", "bfloat16", 5),
        ("llama.cpp", "Q8_0", 5),
        ("llama.cpp", "float32", 5),
        ("llama.cpp", "bfloat16", 5),
    ]


@pytest.mark.parametrize(
    ("peer", "told"),
    [
        (("openvino", "bfloat16", 1), "give --threads 2"),
        (("llama.cpp", "int8"), "llama.cpp has no format int8"),
        (("openvino", "Q8_0"), "openvino has no format Q8_0"),
        (("transformers", "float32"), "transformers is not scored; there are: llama.cpp, openvino"),
    ],
)
def test_what_is_not_scored_is_told(scored, peer, told):
    with pytest.raises(ConfigError, match=told):
        scored(*peer)


def test_a_missing_package_is_told_with_the_way_to_it(scored, monkeypatch):
    packages.llama_cpp.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    for name, package in (("llama.cpp", "llama-cpp-python"), ("openvino", "openvino")):
        with pytest.raises(
            ConfigError, match=rf"package {package}: pip install 'sparserve\[bench\]'"
        ):
            scored(name, "float16")
