"""Hugging Face folders: how they load, and how damaged ones are refused."""

import json
import math
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sparserve.errors import CorruptCheckpoint, ModelError, ModelNotFound, UnsupportedModel
from sparserve.model.loader import load_model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def folder(write_tiny_checkpoint, tmp_path) -> Path:
    return write_tiny_checkpoint(tmp_path / "tiny")


def load(folder: Path, dtype: str = "auto"):
    return load_model(str(folder), dtype=dtype)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS)


# --- what loads ---


def test_weights_are_those_of_the_file_under_our_names(folder):
    tensors, weights = load_file(folder / WEIGHTS), load(folder).weights
    assert torch.equal(weights.embedding, tensors["model.embed_tokens.weight"])
    assert torch.equal(weights.lm_head, tensors["lm_head.weight"])
    assert torch.equal(weights.norm, tensors["model.norm.weight"])
    assert len(weights.layers) == 2
    assert torch.equal(weights.layers[1].w_gate, tensors[GATE])
    assert torch.equal(weights.layers[0].wo, tensors["model.layers.0.self_attn.o_proj.weight"])
    assert torch.equal(
        weights.layers[0].mlp_norm, tensors["model.layers.0.post_attention_layernorm.weight"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matrices_of_the_wanted_dtype_stay_in_the_files_own_pages(
    write_tiny_checkpoint, tmp_path, mapped_file, dtype
):
    folder = write_tiny_checkpoint(tmp_path / "tiny", dtype=dtype)
    weights = load(folder).weights
    matrices = [weights.embedding, weights.lm_head]
    for layer in weights.layers:
        matrices += [layer.wq, layer.wk, layer.wv, layer.wo]
        matrices += [layer.w_gate, layer.w_up, layer.w_down]
    for matrix in matrices:
        assert matrix.dtype == dtype
        assert matrix.is_contiguous()
        assert mapped_file(matrix) == str(folder / WEIGHTS)


def test_shards_stay_in_their_files_own_pages(folder, mapped_file):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    parts = {"a.safetensors": [], "b.safetensors": []}
    for i, name in enumerate(tensors):
        parts["ab"[i % 2] + ".safetensors"].append(name)
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    where = {name: file for file, names in parts.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    gate = load(folder).weights.layers[1].w_gate
    assert torch.equal(gate, tensors[GATE])
    assert mapped_file(gate) == str(folder / where[GATE])


def test_a_tied_head_is_the_embedding_and_a_stored_one_is_ignored(folder):
    edit_json(folder / "config.json", tie_word_embeddings=True)
    weights = load(folder).weights
    assert weights.lm_head is weights.embedding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_converts_matrices_and_keeps_norms_in_float32(folder, dtype):
    tensors, weights = load_file(folder / WEIGHTS), load(folder, dtype).weights
    wanted = getattr(torch, dtype)
    assert weights.dtype == weights.embedding.dtype == weights.lm_head.dtype == wanted
    assert torch.equal(weights.layers[1].w_gate, tensors[GATE].to(wanted))
    assert weights.norm.dtype == weights.layers[0].attn_norm.dtype == torch.float32


def test_progress_counts_tensors_up_to_their_number(folder):
    seen = []
    load_model(str(folder), on_tensor=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 21) for i in range(1, 22)]


def test_name_is_the_folders_even_with_a_trailing_dot(folder, monkeypatch):
    assert load(folder).name == "tiny"
    monkeypatch.chdir(folder)
    assert load_model(".").name == "tiny"
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_model("~/tiny").name == "tiny"


def test_chat_template_comes_from_any_of_its_three_places(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": "one"}))
    assert load(folder).chat_template == "one"
    named = [{"name": "tool_use", "template": "no"}, "odd", {"name": "default", "template": "two"}]
    path.write_text(json.dumps({"chat_template": named}))
    assert load(folder).chat_template == "two"
    (folder / "chat_template.jinja").write_text("three ü", encoding="utf-8")
    assert load(folder).chat_template == "three ü"
    (folder / "chat_template.jinja").unlink()
    path.unlink()
    assert load(folder).chat_template is None


# --- what is refused ---


@pytest.mark.parametrize(
    "model", ["no/such/folder", "nothing.gguf", "", "x" * 5000, "~nobody-of-that-name/x", "a\0b"]
)
def test_a_model_that_is_not_there_is_not_found_by_name(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound) as refused:
        load_model(model)
    assert str(Path(model))[:40] in str(refused.value).replace("\\x00", "\0")


def test_a_file_of_another_kind_is_not_found_and_the_kinds_are_named(folder):
    with pytest.raises(ModelNotFound, match=r"config\.json.*\.gguf.*smollm2"):
        load_model(str(folder / "config.json"))


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelNotFound, match=name):
        load(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", INDEX, "tokenizer_config.json"]
)
@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"", "is not JSON"),
        (b'{"a": ', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "is not JSON"),
        (b"[1, 2]", "holds a list, expected an object"),
        (b"null", "holds a NoneType"),
        (b"\xff\xfe{}", "UTF-8"),
    ],
    ids=["empty", "cut", "deep", "long number", "list", "null", "not UTF-8"],
)
def test_json_that_is_none_or_no_object_is_corrupt_and_named(folder, name, text, named):
    (folder / name).write_bytes(text)
    with pytest.raises(CorruptCheckpoint, match=named) as refused:
        load(folder)
    assert str(folder / name) in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, UnsupportedModel, "MixtralForCausalLM"),
        ({"hidden_act": "gelu"}, UnsupportedModel, "gelu"),
        ({"mlp_bias": True}, UnsupportedModel, "mlp_bias"),
        ({"hidden_size": 2**40}, CorruptCheckpoint, "hidden_size is 1099511627776"),
        ({"num_hidden_layers": -3}, CorruptCheckpoint, "num_layers is -3"),
        ({"rms_norm_eps": math.nan}, CorruptCheckpoint, "rms_norm_eps is nan"),
    ],
    ids=str,
)
def test_errors_of_the_config_name_its_file(folder, changes, error, named):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(error, match=named) as refused:
        load(folder)
    assert str(refused.value).startswith(f"{folder / 'config.json'}: ")


@pytest.mark.parametrize(
    "size", ["vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_hidden_layers"]
)
def test_absurd_sizes_are_refused_before_memory_is_asked_for(folder, size):
    edit_json(folder / "config.json", **{size: 2**30, "num_key_value_heads": 4})
    with pytest.raises(CorruptCheckpoint, match=r"tensor .* (shape .* asks for|missing)"):
        load(folder)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", GATE])
def test_a_missing_tensor_is_named(folder, name):
    edit_tensors(folder, **{name: None})
    with pytest.raises(CorruptCheckpoint, match=f"{name} is missing from {folder}"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (GATE, (96, 65)),
        (GATE, (96 * 64,)),
        (GATE, (1, 96, 64)),
        (GATE, (0,)),
        ("model.norm.weight", (1, 64)),
        ("model.embed_tokens.weight", (258, 64)),
    ],
)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder, name, shape):
    expected = list(load_file(folder / WEIGHTS)[name].shape)
    edit_tensors(folder, **{name: torch.zeros(shape)})
    with pytest.raises(CorruptCheckpoint) as refused:
        load(folder)
    assert all(part in str(refused.value) for part in (name, str(list(shape)), str(expected)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float64, torch.bool])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", GATE])
def test_a_tensor_of_no_float_type_is_unsupported(folder, name, dtype):
    edit_tensors(folder, **{name: torch.zeros(96, 64).to(dtype)})
    with pytest.raises(UnsupportedModel, match=f"{name} is {dtype}; supported"):
        load(folder)


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.5, 0.999])
def test_truncated_weights_are_corrupt_and_named(folder, share):
    path = folder / WEIGHTS
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(CorruptCheckpoint, match=str(path)):
        load(folder)


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**40, 2**63, 2**64 - 1])
def test_a_wrong_header_length_is_corrupt_and_named(folder, length):
    path = folder / WEIGHTS
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(CorruptCheckpoint, match=str(path)):
        load(folder)


def test_pickled_weights_are_not_looked_at(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match="must be safetensors"):
        load(folder)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..",
        "",
        ".",
        "model.bin",
        "model.safetensors/..",
        5,
        None,
    ],
    ids=str,
)
def test_a_shard_outside_the_folder_or_of_another_kind_is_refused(folder, shard):
    (folder / INDEX).write_text(json.dumps({"weight_map": {GATE: shard, "other": WEIGHTS}}))
    with pytest.raises(CorruptCheckpoint, match=INDEX) as refused:
        load(folder)
    assert repr(str(shard)) in str(refused.value)


@pytest.mark.parametrize("weight_map", [None, {}, [], [1, 2], "abc", 5], ids=str)
def test_an_index_without_shards_is_refused(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptCheckpoint, match=f"{INDEX} names no shards"):
        load(folder)


def test_a_missing_shard_is_named(folder):
    shard = "model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": WEIGHTS, "b": shard}}))
    with pytest.raises(ModelNotFound, match=shard):
        load(folder)


def test_a_shard_with_too_long_a_name_is_corrupt(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "a" * 5000 + ".safetensors"}}))
    with pytest.raises(CorruptCheckpoint, match="too long"):
        load(folder)


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"\xff", b'{"model": 5}', b'{"model": {"type": "BPE"}}'], ids=repr
)
def test_a_damaged_tokenizer_is_corrupt_and_named(folder, text):
    (folder / "tokenizer.json").write_bytes(text)
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer\.json"):
        load(folder)


def test_a_chat_template_that_is_not_text_is_corrupt_and_named(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptCheckpoint, match=r"chat_template\.jinja"):
        load(folder)


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(folder):
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 259, "content": "<extra>"})
    path.write_text(json.dumps(raw))
    with pytest.raises(CorruptCheckpoint, match="up to 259, the embedding only 259 rows"):
        load(folder)


def test_a_tokenizer_of_few_tokens_but_a_high_id_is_refused(folder):
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"]["A"] = 70000
    path.write_text(json.dumps(raw))
    with pytest.raises(CorruptCheckpoint, match="up to 70000, the embedding only 259 rows"):
        load(folder)


@given(flips=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=4))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.timeout(60)
def test_any_damage_to_the_header_gives_weights_or_a_model_error(
    tmp_path_factory, write_tiny_checkpoint, flips
):
    folder = tmp_path_factory.getbasetemp() / "damaged-safetensors"
    if not folder.exists():
        write_tiny_checkpoint(folder)
        (folder / WEIGHTS).rename(folder / "whole")
    data = bytearray((folder / "whole").read_bytes())
    for at, value in flips:
        data[at] = value
    (folder / WEIGHTS).unlink(missing_ok=True)  # a mapping of the last example may still be alive
    (folder / WEIGHTS).write_bytes(data)
    try:
        load(folder)
    except ModelError as error:
        assert len(str(error)) < 2000  # noqa: PT017
