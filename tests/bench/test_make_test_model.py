"""The tool that takes a model off its quantization grid keeps what it computes."""

import importlib.util
from pathlib import Path

import pytest
import torch

from sparserve.model.backend import ForwardBatch, Phase, SequenceInput
from sparserve.model.loader import LoadedModel, load_model
from sparserve.model.reference import ReferenceBackend

TOKENS = tuple(range(40, 90))


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[2] / "tools" / "make_test_model.py"
    spec = importlib.util.spec_from_file_location("make_test_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logits_of(model: LoadedModel) -> torch.Tensor:
    backend = ReferenceBackend(model.config, model.weights, num_blocks=4, threads=1)
    offsets = tuple(range(len(TOKENS)))
    prompt = SequenceInput(TOKENS, 0, range(4), Phase.PREFILL, output_offsets=offsets)
    candidates = backend.forward(ForwardBatch([prompt])).candidates
    return torch.stack([candidates.full_logits(row).clone() for row in offsets])


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
def test_the_logits_stay_and_the_weights_do_not(
    tool, write_tiny_checkpoint, tmp_path, architecture
):
    model = load_model(
        str(write_tiny_checkpoint(tmp_path / "source", architectures=[architecture]))
    )
    tool.write_folder(tool.fold_scales(model, seed=1), tmp_path / "folded")
    folded = load_model(str(tmp_path / "folded"))
    before = logits_of(model)
    torch.testing.assert_close(logits_of(folded), before, atol=2e-4, rtol=1e-4)
    assert folded.chat_template == model.chat_template
    assert folded.config.eos_token_ids == model.config.eos_token_ids
    for ours, theirs in zip(model.weights.layers, folded.weights.layers, strict=True):
        for name in ("attn_norm", "wq", "wk", "wv", "wo", "mlp_norm", "w_gate", "w_up", "w_down"):
            ratio = getattr(theirs, name) / getattr(ours, name)
            assert 1.5 < float(ratio.max() / ratio.min()) < 17, name


def test_a_seed_always_gives_the_same_weights(tool, tiny_model):
    first, again, other = (
        tool.fold_scales(tiny_model, seed).weights.layers[1].wv for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
