"""The files that peers load: written once, of these very weights."""

import dataclasses

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from sparserve.bench.peers.gguf_files import bits_per_weight, gguf_file, step_weight_bytes
from sparserve.model.loader import load_model
from sparserve.model.weights import step_weight_bytes as ours


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_a_step_reads_the_same_bytes_of_a_file_as_of_our_weights(
    write_mergeable, tmp_path, tied, format
):
    model = load_model(str(write_mergeable(tmp_path / "tied", tie_word_embeddings=tied)))
    file = gguf_file(model, format)
    assert step_weight_bytes(file) == ours(model.config, getattr(torch, format))


def test_a_file_is_written_once(peer_model, cache):
    file = gguf_file(peer_model, "float16")
    before = file.stat()
    assert gguf_file(peer_model, "float16") == file
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert [*(cache / "peers").iterdir()] == [file]


def test_other_weights_are_another_file(peer_model):
    weights = peer_model.weights
    head = weights.lm_head.clone()
    head[3, 5] += 1e-3
    other = dataclasses.replace(peer_model, weights=dataclasses.replace(weights, lm_head=head))
    assert gguf_file(other, "float32") != gguf_file(peer_model, "float32")


def test_quantized_files_are_llama_cpps(write_mergeable, tmp_path, cache):
    pytest.importorskip("llama_cpp")
    model = load_model(str(write_mergeable(tmp_path / "m", intermediate_size=128)))
    file = gguf_file(model, "Q8_0")
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(file).tensors}
    assert kinds["blk.1.ffn_down.weight"] == GGMLQuantizationType.Q8_0
    assert kinds["blk.1.ffn_norm.weight"] == GGMLQuantizationType.F32
    assert step_weight_bytes(file) < 0.3 * ours(model.config, torch.float32)
    # Blocks of 32 weights with a scale in 16 bits; norms in 32. The vocabulary is no weight.
    decoder, whole = bits_per_weight(file)
    assert decoder == 8.5
    norms = (2 * model.config.num_layers + 1) * model.config.hidden_size
    assert whole == pytest.approx(8.5 + (32 - 8.5) * norms / model.config.num_parameters)
    assert [*(cache / "peers").iterdir()] == [file]
