"""The tool that writes a model of random weights: it loads, it generates, rivals can read it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from sparserve.bench.to_gguf import write_gguf
from sparserve.config import EngineSettings
from sparserve.engine.factory import build_engine
from sparserve.engine.request import GenerationRequest, SamplingParams, StoppingParams
from sparserve.model.loader import load_model

TOOLS = Path(__file__).parents[2] / "tools"
SMALL = {"hidden-size": 64, "num-hidden-layers": 2, "num-attention-heads": 4, "vocab-size": 258}
SMALL |= {"num-key-value-heads": 2, "intermediate-size": 96, "max-position-embeddings": 128}


@pytest.fixture
def run_tool(monkeypatch, mergeable_folder):
    """`run_tool(folder, …)`: with the tokenizer of the tests' model, of which only the first two merges are left."""
    monkeypatch.syspath_prepend(TOOLS)

    def run(folder: Path, *flags: str) -> None:
        shape = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
        argv = ["make_random_model.py", str(mergeable_folder), str(folder), *shape, *flags]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(TOOLS / "make_random_model.py"), run_name="__main__")

    return run


def test_the_model_loads_and_generates_and_is_named_random(run_tool, tmp_path):
    run_tool(tmp_path / "random-tiny")
    built = build_engine(
        EngineSettings(model=str(tmp_path / "random-tiny"), threads=1, kv_cache_gib=0.01)
    )
    assert built.model_name == "random-tiny"
    stopping = StoppingParams(max_tokens=8, ignore_eos=True)
    built.engine.add(
        GenerationRequest("r", tuple(range(40)), SamplingParams(temperature=0), stopping)
    )
    made = []
    while built.engine.has_work:
        made += [token.id for update in built.engine.step() for token in update.tokens]
    assert len(made) == 8


def test_its_weights_are_bfloat16_of_a_size_that_keeps_that_of_activations(run_tool, tmp_path):
    run_tool(tmp_path / "random-tiny")
    model = load_model(str(tmp_path / "random-tiny"))
    assert model.weights.dtype == torch.bfloat16
    layer = model.weights.layers[1]
    assert layer.w_down.float().std().item() == pytest.approx(96**-0.5, rel=0.1)
    assert torch.equal(layer.mlp_norm, torch.ones(64))
    assert not torch.equal(layer.w_up, model.weights.layers[0].w_up)
    shards = sorted((tmp_path / "random-tiny").glob("*.safetensors"))
    assert len(shards) == 2 + 2


def test_a_seed_always_gives_the_same_weights(run_tool, tmp_path):
    embeddings = []
    for name, seed in (("random-a", "3"), ("random-b", "3"), ("random-c", "4")):
        run_tool(tmp_path / name, "--seed", seed)
        embeddings.append(load_model(str(tmp_path / name)).weights.embedding)
    assert torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(embeddings[0], embeddings[2])


def test_its_tokenizer_has_no_ids_beyond_the_vocabulary_and_fits_into_gguf(run_tool, tmp_path):
    run_tool(tmp_path / "random-tiny")
    model = load_model(str(tmp_path / "random-tiny"))
    vocabulary = model.tokenizer.get_vocab()
    assert max(vocabulary.values()) == 257
    assert "the" in vocabulary
    assert "12" not in vocabulary
    text = "In the 12 therefore"
    assert model.tokenizer.decode(model.tokenizer.encode(text).ids) == text
    write_gguf(model, tmp_path / "x.gguf", "bfloat16")
    again = load_model(str(tmp_path / "x.gguf"))
    assert again.tokenizer.encode(text).ids == model.tokenizer.encode(text).ids
    config = json.loads((tmp_path / "random-tiny" / "config.json").read_text())
    assert "bos_token_id" not in config  # it was among those cut off


@pytest.mark.parametrize(
    ("name", "told"),
    [("tiny-llama", "does not say random"), ("random-there", "exists; nothing is overwritten")],
)
def test_what_is_not_written_is_told(run_tool, tmp_path, capsys, name, told):
    (tmp_path / "random-there").mkdir()
    with pytest.raises(SystemExit):
        run_tool(tmp_path / name)
    assert told in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [tmp_path / "random-there"]
