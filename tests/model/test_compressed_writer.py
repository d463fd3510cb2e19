"""Writing folders of compressed models: whole or not at all, and on from where a run stopped."""

import fcntl
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_kernels.formats import DecoderFormats, MatrixFormat
from sparse_kernels.weights import EndTensors
from sparserve.errors import ConfigError, CorruptCheckpoint, ModelNotFound, UnsupportedModel
from sparserve.model.compressed_checkpoint import Source
from sparserve.model.compressed_writer import (
    CheckpointWriter,
    alone_with,
    check_source,
    first_info,
)
from sparserve.model.loader import load_model
from sparserve.model.safetensors_checkpoint import HuggingFaceFolder

INT4 = MatrixFormat(4, 32)
FORMATS = DecoderFormats(INT4, INT4, MatrixFormat(8, 64), MatrixFormat(8, 64))


@pytest.fixture(scope="module")
def source(write_tiny_checkpoint, tmp_path_factory) -> Path:
    folder = write_tiny_checkpoint(
        tmp_path_factory.mktemp("source"), dtype=torch.bfloat16, num_hidden_layers=4
    )
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "README.md").write_text("not copied")
    return folder


@pytest.fixture(scope="module")
def whole(source, write_compressed, tmp_path_factory):
    """(a folder that was written in one go, what is in it)"""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, write_compressed(source, FORMATS, out)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_folder_has_what_serving_needs(whole):
    assert sorted(contents(whole[0])) == [
        "chat_template.jinja", "compression.json", "config.json", "ends.safetensors",
        *(f"layers/0000{i}.safetensors" for i in range(4)), "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


@pytest.mark.parametrize("layers", [0, 1, 3, 4])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    source, whole, write_compressed, tmp_path, layers
):
    out = tmp_path / "out"
    write_compressed(source, FORMATS, out, layers=layers)
    assert not out.exists()
    writer = CheckpointWriter(out, whole[1].info)
    assert writer.finished_layers() == list(range(layers))
    for index in range(layers):
        assert torch.equal(writer.read_layer(index).up.codes, whole[1].layers[index].up.codes)
    kept = {path: path.stat().st_ino for path in (tmp_path / "out.partial/layers").iterdir()}
    write_compressed(source, FORMATS, out)
    assert contents(out) == contents(whole[0])
    for path, number in kept.items():  # not written again
        assert (out / "layers" / path.name).stat().st_ino == number
    assert not (tmp_path / "out.partial").exists()


def test_what_was_cut_off_is_written_again(source, whole, write_compressed, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    write_compressed(source, FORMATS, out, layers=3)
    torn = partial / "layers/00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    (partial / "layers/00003.safetensors.77.unfinished").write_bytes(b"torn")
    (partial / "config.json.unfinished").write_bytes(b"torn")
    assert CheckpointWriter(out, whole[1].info).finished_layers() == [0]
    write_compressed(source, FORMATS, out)
    assert contents(out) == contents(whole[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": {"name": "another"}},
        {"formats": replace(FORMATS, activation_bits=8)},
        {"texts": ("a hash", "another")},
        {"texts": ()},
        {"sparserve_version": "0.0.1"},
        {"source": "another hash"},
    ],
    ids=str,
)
def test_another_run_begins_anew(source, whole, write_compressed, tmp_path, changes):
    out = tmp_path / "out"
    write_compressed(source, FORMATS, out, layers=2)
    info = whole[1].info
    if "source" in changes:
        changes = {"source": replace(info.source, hash=changes["source"])}
    assert CheckpointWriter(out, info).finished_layers() == [0, 1]
    assert CheckpointWriter(out, replace(info, **changes)).finished_layers() == []
    assert CheckpointWriter(out, info).finished_layers() == []


def test_a_run_goes_on_wherever_its_source_is(source, whole, write_compressed, tmp_path):
    out = tmp_path / "out"
    write_compressed(source, FORMATS, out, layers=2)
    moved = tmp_path / "moved"
    source_at = whole[1].info.source
    moved.symlink_to(source)
    info = replace(whole[1].info, source=Source("moved", str(moved), source_at.hash))
    assert CheckpointWriter(out, info).finished_layers() == [0, 1]


@pytest.mark.parametrize("damage", ["{", '{"format_version": 9}'])
def test_an_unreadable_info_begins_anew(source, whole, write_compressed, tmp_path, damage):
    write_compressed(source, FORMATS, tmp_path / "out", layers=2)
    (tmp_path / "out.partial/compression.json").write_text(damage)
    assert CheckpointWriter(tmp_path / "out", whole[1].info).finished_layers() == []


def test_what_is_there_is_not_touched(whole, tmp_path):
    info = whole[1].info
    for out in (whole[0], tmp_path, Path("."), Path(__file__)):
        with pytest.raises(ConfigError, match=f"{out} is there already; remove it, or take"):
            CheckpointWriter(out, info)
    other = tmp_path / "out.partial"
    other.mkdir()
    (other / "mine").write_text("mine")
    with pytest.raises(ConfigError, match=f"{other} is there and no unfinished checkpoint"):
        CheckpointWriter(tmp_path / "out", info)
    assert contents(other) == {"mine": b"mine"}


def test_a_folder_that_comes_in_between_is_not_touched(source, whole, write_compressed, tmp_path):
    out = tmp_path / "out"
    write_compressed(source, FORMATS, out, layers=4)
    writer = CheckpointWriter(out, whole[1].info)
    out.mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        writer.finish(whole[1].ends)
    assert list(out.iterdir()) == []


def test_a_missing_layer_ends_nothing(source, whole, write_compressed, tmp_path):
    out = tmp_path / "out"
    write_compressed(source, FORMATS, out, layers=3)
    with pytest.raises(ValueError, match="layer 3 is not written yet"):
        CheckpointWriter(out, whole[1].info).finish(whole[1].ends)
    assert not out.exists()
    with pytest.raises(CorruptCheckpoint, match="the files of 3 layers"):
        load_model(str(tmp_path / "out.partial"))


def test_a_place_that_cannot_be_written_is_told(whole, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/out.partial cannot be written"):
        CheckpointWriter(tmp_path / "file" / "out", whole[1].info)


def test_an_info_that_could_not_be_read_again_is_told_at_once(whole, tmp_path):
    info = replace(whole[1].info, recipe={"path": "\udcff"})
    with pytest.raises(CorruptCheckpoint, match=r"compression\.json"):
        CheckpointWriter(tmp_path / "out", info)
    info = replace(info, recipe={"bits": (4, 8), "name": None})
    assert CheckpointWriter(tmp_path / "out", info).info.recipe == {"bits": [4, 8], "name": None}


def test_layers_in_other_formats_are_refused(whole, tmp_path):
    made = whole[1]
    writer, layer = CheckpointWriter(tmp_path / "out", made.info), made.layers[0]
    oversized = layer.up.codes.clone()
    oversized[0, 1] = 16
    wrong = {
        "a code is 16, and 4 bits hold 15": {"up": replace(layer.up, codes=oversized)},
        "00000: tensor q.codes is missing": {"q": torch.zeros(64, 64).bfloat16()},
        r"00000: tensor down.codes is .* \[64, 96\]; expected .* \[96, 64\]": {
            "down": replace(layer.down, codes=layer.down.codes.T.contiguous())
        },
        "00000: tensor mlp_norm has values that are not finite": {"mlp_norm": layer.mlp_norm / 0},
        "nothing reads its tensors .*'q_bias'": {"q_bias": torch.zeros(64)},
    }
    for told, change in wrong.items():
        with pytest.raises(ValueError, match=told):
            writer.write_layer(0, replace(layer, **change))
    assert writer.finished_layers() == []
    with pytest.raises(ValueError, match=r"ends: tensor lm_head\.codes is missing"):
        writer.finish(EndTensors(made.ends.embedding, made.ends.norm))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_becomes_a_folder_in_the_terms_of_hugging_face(
    write_gguf, write_compressed, tmp_path, architecture
):
    template = "{{ messages[0].content }}\r\n{# as it is #}"
    path = tmp_path / "tiny.gguf"
    write_gguf(
        path,
        architecture=architecture,
        attention_bias=architecture == "qwen2",
        fields={"tokenizer.chat_template": template, "tokenizer.ggml.add_bos_token": True},
    )
    made = write_compressed(path, FORMATS, tmp_path / "out")
    source, model = load_model(str(path)), load_model(str(tmp_path / "out"))
    assert model.config == source.config
    assert model.chat_template == template
    assert model.tokenizer.to_str() == source.tokenizer.to_str()
    assert model.compressed.info.source.path == str(path)
    for stored, layer in zip(model.compressed.layers, made.layers, strict=True):
        assert torch.equal(stored.q.codes, layer.q.codes)
    for ours, theirs in zip(model.weights.layers, source.weights.layers, strict=True):
        torch.testing.assert_close(ours.wq.float(), theirs.wq, atol=0.05, rtol=0)


def test_the_demo_model_keeps_its_tokenizer_and_chats(demo_bfloat16, tmp_path):
    info = first_info(demo_bfloat16, {"name": "test"}, FORMATS)
    folder = HuggingFaceFolder(CheckpointWriter(tmp_path / "out", info).folder)
    assert folder.config == demo_bfloat16.config
    assert folder.chat_template() == demo_bfloat16.chat_template
    ours, theirs = folder.tokenizer(), demo_bfloat16.tokenizer
    text = "<|im_start|>user\r\n  Größe 12345, naïve 日本語 🦀 isn't\t<|im_end|>\n\n\n end "
    for special in (True, False):
        ids = theirs.encode(text, add_special_tokens=special).ids
        assert ours.encode(text, add_special_tokens=special).ids == ids
        for skip in (True, False):
            told = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == told
    assert ours.get_vocab() == theirs.get_vocab()


def test_a_run_on_a_gguf_file_goes_on(write_gguf, write_compressed, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    write_compressed(path, FORMATS, tmp_path / "whole")
    made = write_compressed(path, FORMATS, tmp_path / "out", layers=1)
    assert CheckpointWriter(tmp_path / "out", made.info).finished_layers() == [0]
    write_compressed(path, FORMATS, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_a_folder_cannot_hold_is_refused(whole, write_gguf, tmp_path):
    factors, biased = tmp_path / "factors.gguf", tmp_path / "biased.gguf"
    write_gguf(factors, extra={"rope_freqs.weight": np.ones(8, dtype=np.float32)})
    with pytest.raises(UnsupportedModel, match=f"{factors} has .*rope_freqs.* Hugging Face folder"):
        first_info(load_model(str(factors)), {}, FORMATS)
    write_gguf(biased, attention_bias=True)
    with pytest.raises(UnsupportedModel, match=f"{biased}: .* no words for qkv_bias True"):
        first_info(load_model(str(biased)), {}, FORMATS)
    with pytest.raises(UnsupportedModel, match=f"{whole[0]} is compressed already, from .*source"):
        check_source(load_model(str(whole[0])))
    info = replace(whole[1].info, source=Source("tiny", str(tmp_path), ""))
    with pytest.raises(ModelNotFound, match=r"has no config.json"):
        CheckpointWriter(tmp_path / "out", info)


def test_who_is_refused_leaves_the_lock_to_who_has_it(tmp_path):
    with alone_with(tmp_path / "out"):
        for _ in range(2):
            with (
                pytest.raises(ConfigError, match="another process compresses to"),
                alone_with(tmp_path / "out"),
            ):
                pass
    with alone_with(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_once_it_is_locked_is_locked_anew(tmp_path, monkeypatch):
    lock = fcntl.flock

    def late(*arguments: int) -> None:
        monkeypatch.undo()
        (tmp_path / "out.partial").rmdir()  # as who had it does at its end
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with (
        alone_with(tmp_path / "out"),
        pytest.raises(ConfigError, match="another process"),
        alone_with(tmp_path / "out"),
    ):
        pass


def test_a_finished_run_leaves_the_folder_of_the_next_one(tmp_path):
    with alone_with(tmp_path / "out"):
        (tmp_path / "out.partial").rename(tmp_path / "out")
        (tmp_path / "out.partial").mkdir()
    assert (tmp_path / "out.partial").is_dir()
