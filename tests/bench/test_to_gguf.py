"""Written GGUF files: read back by our loader, and by llama.cpp where it is installed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from typer.testing import CliRunner

from sparserve.bench.to_gguf import write_gguf
from sparserve.cli import app
from sparserve.errors import ConfigError, UnsupportedModel
from sparserve.model.backend import ForwardBatch, Phase, SequenceInput
from sparserve.model.config import LayerSize
from sparserve.model.llama import rope_frequencies
from sparserve.model.loader import load_model
from sparserve.model.reference import ReferenceBackend

TEXTS = st.lists(
    st.text(max_size=6) | st.sampled_from(["the ", " a", "12", "in", "<bos>", "'s ", "\n"]),
    max_size=8,
).map("".join)


def assert_tokenizers_agree(ours: Tokenizer, theirs: Tokenizer) -> None:
    @given(TEXTS)
    @settings(max_examples=100, deadline=None)
    def holds(text: str) -> None:
        assert ours.encode(text).ids == theirs.encode(text).ids

    holds()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": True, "head_dim": 24},
        {"attention_bias": True},
        {"architectures": ["MistralForCausalLM"], "sliding_window": None},
        {"architectures": ["Qwen2ForCausalLM"]},
        {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    ],
    ids=["llama", "tied, wide heads", "biases", "mistral", "qwen2", "qwen3"],
)
def test_our_loader_reads_back_the_same_model(write_mergeable, tmp_path, config, dtype):
    model = load_model(str(write_mergeable(tmp_path / "source", **config)))
    write_gguf(model, tmp_path / "model.gguf", dtype)
    back = load_model(str(tmp_path / "model.gguf"))
    kind = getattr(torch, dtype)
    assert back.weights.dtype == kind
    assert torch.equal(back.weights.embedding, model.weights.embedding.to(kind))
    assert torch.equal(back.weights.lm_head, model.weights.lm_head.to(kind))
    assert torch.equal(back.weights.norm, model.weights.norm)
    for ours, theirs in zip(back.weights.layers, model.weights.layers, strict=True):
        for name in theirs.__dataclass_fields__:
            expected = getattr(theirs, name)
            if expected is None:
                assert getattr(ours, name) is None
                continue
            expected = expected.to(kind if expected.dim() == 2 else torch.float32)
            assert torch.equal(getattr(ours, name), expected), name
    for name in back.config.__dataclass_fields__:
        if name not in ("architecture", "rms_norm_eps"):
            assert getattr(back.config, name) == getattr(model.config, name), name
    assert back.config.rms_norm_eps == pytest.approx(model.config.rms_norm_eps)
    assert back.chat_template == model.chat_template
    assert_tokenizers_agree(back.tokenizer, model.tokenizer)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64,
            "attention_factor": 0.75,
        },
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)  # fmt: skip
def test_rope_comes_back_with_its_frequencies(write_mergeable, tmp_path, rope):
    folder = write_mergeable(tmp_path / "source", rope_scaling=rope, head_dim=64)
    model = load_model(str(folder))
    write_gguf(model, tmp_path / "model.gguf", "float32")
    back = load_model(str(tmp_path / "model.gguf"))
    ours = rope_frequencies(back.config.rope, 64, back.weights.rope_factors)
    torch.testing.assert_close(ours, rope_frequencies(model.config.rope, 64), atol=0, rtol=1e-5)
    assert not torch.allclose(ours, 1e4 ** -(torch.arange(0, 64, 2) / 64))
    assert back.config.rope.attention_factor == pytest.approx(model.config.rope.attention_factor)
    write_gguf(back, tmp_path / "again.gguf", "float32")
    again = load_model(str(tmp_path / "again.gguf"))
    third = rope_frequencies(again.config.rope, 64, again.weights.rope_factors)
    torch.testing.assert_close(third, ours, atol=0, rtol=1e-5)


def test_rows_beyond_the_tokenizer_become_unused_tokens(write_mergeable, tmp_path):
    model = load_model(str(write_mergeable(tmp_path / "source")))
    wider = load_model(str(write_mergeable(tmp_path / "wider", vocab_size=300)))
    write_gguf(wider, tmp_path / "model.gguf", "float32")
    back = load_model(str(tmp_path / "model.gguf"))
    assert back.config.vocab_size == 300
    assert_tokenizers_agree(back.tokenizer, model.tokenizer)


def test_every_end_token_comes_back(write_mergeable, tmp_path):
    """Llama 3.1's: of a text, of a message that goes on, of a turn."""
    model = load_model(str(write_mergeable(tmp_path / "source", eos_token_id=[262, 261, 263])))
    write_gguf(model, tmp_path / "model.gguf", "float32")
    assert load_model(str(tmp_path / "model.gguf")).config.eos_token_ids == (262, 261, 263)


def test_a_sentencepiece_tokenizer_comes_back(write_mergeable, tmp_path):
    """One as Llama 2's tokenizer.json has it: merges in the order of their scores, <s> put first."""
    pieces = ["▁t", "he", "▁the", "in", "▁in", "▁a"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("▁", "in"), ("▁", "a")]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *pieces, *"▁thein12ra'"]
    tokens = list(dict.fromkeys(tokens))
    bpe = models.BPE(
        {t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )  # fmt: skip
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 1)]
    )
    special = {"vocab_size": len(tokens), "bos_token_id": 1, "eos_token_id": 2}
    folder = write_mergeable(tmp_path / "source", **special)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_gguf(load_model(str(folder)), tmp_path / "model.gguf", "float32")
    assert_tokenizers_agree(load_model(str(tmp_path / "model.gguf")).tokenizer, tokenizer)


def test_biases_of_output_and_down_come_back(write_mergeable, with_biases, tmp_path):
    model = with_biases(load_model(str(write_mergeable(tmp_path / "source"))))
    write_gguf(model, tmp_path / "model.gguf", "bfloat16")
    back = load_model(str(tmp_path / "model.gguf"))
    assert (back.config.output_bias, back.config.down_bias) == (True, True)
    for ours, theirs in zip(back.weights.layers, model.weights.layers, strict=True):
        assert torch.equal(ours.bo, theirs.bo)
        assert torch.equal(ours.bd, theirs.bd)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_biases_are_refused_where_llama_cpp_has_none(
    write_mergeable, with_biases, tmp_path, architecture
):
    model = load_model(str(write_mergeable(tmp_path / "source", architectures=[architecture])))
    with pytest.raises(UnsupportedModel, match=r"no bias of output and down for qwen\d"):
        write_gguf(with_biases(model), tmp_path / "model.gguf", "float32")
    assert not (tmp_path / "model.gguf").exists()


def test_layers_of_their_own_sizes_are_refused(write_mergeable, tmp_path):
    model = load_model(str(write_mergeable(tmp_path / "source")))
    config = model.config.pruned([LayerSize(4, 2, 96), LayerSize(4, 2, 90)])
    with pytest.raises(UnsupportedModel, match="layers of this model differ in heads or neurons"):
        write_gguf(replace(model, config=config), tmp_path / "model.gguf", "float32")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 64},
            "no sliding window for MistralForCausalLM",
        ),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "no RoPE of the kind dynamic"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 2.0}},
            "beta_slow 1 and truncation alone; this model has 32, 2 and",
        ),
    ],
)
def test_what_llama_cpp_has_no_word_for_is_refused(write_mergeable, tmp_path, config, told):
    model = load_model(str(write_mergeable(tmp_path / "source", **config)))
    with pytest.raises(UnsupportedModel, match=told):
        write_gguf(model, tmp_path / "model.gguf", "float32")
    assert not (tmp_path / "model.gguf").exists()


def test_a_tokenizer_that_cuts_otherwise_is_refused(write_mergeable, tiny_model, tmp_path):
    with pytest.raises(UnsupportedModel, match="BPE tokenizer with 0 merges"):
        write_gguf(tiny_model, tmp_path / "model.gguf", "float32")
    folder = write_mergeable(tmp_path / "source")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        UnsupportedModel, match="cannot be written to GGUF; known are gpt-2, smollm"
    ):
        write_gguf(load_model(str(folder)), tmp_path / "model.gguf", "float32")


def test_a_path_that_cannot_be_written_is_told(mergeable_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"/nowhere/model\.gguf cannot be written"):
        write_gguf(load_model(str(mergeable_folder)), tmp_path / "nowhere/model.gguf", "float32")


def test_the_command_exports_a_model(mergeable_folder, tmp_path):
    target = tmp_path / "model.gguf"
    asked = ["models", "export", str(mergeable_folder), str(target), "--dtype", "bfloat16"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert load_model(str(target)).weights.dtype == torch.bfloat16
    for flags, told in (
        ([str(tmp_path / "model.bin")], "ends in .gguf"),
        ([str(target), "--dtype", "int8"], "no dtype is named int8"),
    ):
        result = CliRunner().invoke(app, ["models", "export", str(mergeable_folder), *flags])
        assert isinstance(result.exception, ConfigError)
        assert told in str(result.exception)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": True, "head_dim": 32},
        {"attention_bias": True},
        {"biases": True},
        {"architectures": ["Qwen2ForCausalLM"]},
        {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "attention_factor": 0.75}},
    ],
    ids=["llama", "tied, wide heads", "biases", "biases of output and down", "qwen2", "qwen3", "linear", "llama3", "yarn", "own yarn"],
)  # fmt: skip
def test_llama_cpp_computes_the_same(write_mergeable, with_biases, tmp_path, config):
    llama_cpp = pytest.importorskip("llama_cpp")
    config = dict(config)
    biased = config.pop("biases", False)
    model = load_model(str(write_mergeable(tmp_path / "source", **config)))
    model = with_biases(model) if biased else model
    write_gguf(model, tmp_path / "model.gguf", "float32")
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, logits_all=True, verbose=False)
    text = "the 12 things in a row<eos>"
    ids = model.tokenizer.encode(text).ids
    assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
    theirs.eval(ids)
    backend = ReferenceBackend(model.config, model.weights, num_blocks=4, threads=1)
    prompt = SequenceInput(ids, 0, range(4), Phase.PREFILL, output_offsets=range(len(ids)))
    candidates = backend.forward(ForwardBatch([prompt])).candidates
    ours = np.stack([candidates.full_logits(row).numpy().copy() for row in range(len(ids))])
    # Its KV cache is float16.
    np.testing.assert_allclose(np.array(theirs.scores)[: len(ids)], ours, atol=1e-2)
    theirs.close()
