"""GGUF files: weights as llama.cpp stores them, the tokenizer inside, and damaged files."""

import math
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparserve.errors import CorruptCheckpoint, ModelError, UnsupportedModel
from sparserve.model.backend import ForwardBatch, Phase, SequenceInput
from sparserve.model.gguf_checkpoint import GGUFCheckpoint
from sparserve.model.llama import rope_frequencies
from sparserve.model.loader import LoadedModel, load_model
from sparserve.model.rope import RopeConfig

DTYPES = {
    Kind.F32: torch.float32,
    Kind.F16: torch.float16,
    Kind.BF16: torch.bfloat16,
    Kind.Q8_0: torch.float32,
    Kind.Q4_0: torch.float32,
    Kind.Q4_1: torch.float32,
    Kind.Q5_0: torch.float32,
    Kind.Q5_1: torch.float32,
}
# The package reads these but does not write them: bytes of a block of 256 weights, where its float16
# scales begin.
K_QUANTS = {
    Kind.Q2_K: (84, (80, 82)),
    Kind.Q3_K: (110, (108,)),
    Kind.Q4_K: (144, (0, 2)),
    Kind.Q5_K: (176, (0, 2)),
    Kind.Q6_K: (210, (208,)),
}
EVERY_KIND = pytest.mark.parametrize("kind", DTYPES, ids=lambda kind: kind.name)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "tiny.gguf"


def load(path: Path, dtype: str = "auto") -> LoadedModel:
    return load_model(str(path), dtype=dtype)


def rounded(weight: torch.Tensor, kind: Kind) -> torch.Tensor:
    """`weight` after a round trip through the gguf package's own quantization."""
    if weight.dim() == 1:
        return weight
    data = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    return torch.from_numpy(data).to(DTYPES[kind])


# --- weights ---


@EVERY_KIND
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_are_those_the_gguf_package_reads_with_heads_in_hugging_face_order(
    write_gguf, path, kind, tied
):
    original = write_gguf(path, kind, tied=tied)
    expected = {name: rounded(weight, kind) for name, weight in original.items()}
    weights = load(path).weights
    assert weights.dtype == DTYPES[kind]
    assert torch.equal(weights.embedding, expected["model.embed_tokens.weight"])
    assert torch.equal(weights.norm, expected["model.norm.weight"])
    if tied:
        assert weights.lm_head is weights.embedding
    else:
        assert torch.equal(weights.lm_head, expected["lm_head.weight"])
    for i, layer in enumerate(weights.layers):
        for field, name in {
            "attn_norm": "input_layernorm",
            "wq": "self_attn.q_proj",
            "wk": "self_attn.k_proj",
            "wv": "self_attn.v_proj",
            "wo": "self_attn.o_proj",
            "mlp_norm": "post_attention_layernorm",
            "w_gate": "mlp.gate_proj",
            "w_up": "mlp.up_proj",
            "w_down": "mlp.down_proj",
        }.items():
            assert torch.equal(
                getattr(layer, field), expected[f"model.layers.{i}.{name}.weight"]
            ), name


@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
def test_k_quants_are_those_the_gguf_package_reads(write_gguf, path, kind):
    size, scales = K_QUANTS[kind]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (256, 1, size), dtype=np.uint8)
    for at in scales:
        finite = random.standard_normal((256, 1)).astype(np.float16)
        blocks[:, :, at : at + 2] = finite.view(np.uint8).reshape(256, 1, 2)
    raw = blocks.reshape(256, size)
    names = ("blk.0.ffn_up.weight", "blk.0.attn_k.weight")
    write_gguf(
        path, hidden=256, intermediate=256, heads=4, kv_heads=4, drop=names,
        extra=dict.fromkeys(names, (raw, kind)),
    )  # fmt: skip
    layer = load(path).weights.layers[0]
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    assert bool(expected.isfinite().all())
    assert torch.equal(layer.w_up, expected)
    halves = expected.view(4, 32, 2, 256).transpose(1, 2).reshape(256, 256)
    assert torch.equal(layer.wk, halves)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_families_load_with_their_biases_and_norms(write_gguf, path, architecture):
    """Only files of the llama architecture interleave the halves of q and k heads."""
    original = write_gguf(path, architecture=architecture, attention_bias=architecture != "qwen3")
    model = load(path)
    layer, prefix = model.weights.layers[1], "model.layers.1.self_attn."
    assert torch.equal(layer.wq, original[prefix + "q_proj.weight"])
    assert torch.equal(layer.wk, original[prefix + "k_proj.weight"])
    biases = (layer.bq, layer.bk, layer.bv)
    if architecture == "qwen3":
        assert biases == (None, None, None)
        assert torch.equal(layer.q_norm, original[prefix + "q_norm.weight"])
        assert torch.equal(layer.k_norm, original[prefix + "k_norm.weight"])
    else:
        for bias, part in zip(biases, "qkv", strict=True):
            assert torch.equal(bias, original[f"{prefix}{part}_proj.bias"])
        assert (layer.q_norm, layer.k_norm) == (None, None)
    assert layer.bo is None


def test_yarn_is_read_under_its_own_names(write_gguf, path):
    scaling = {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": 128,
        "yarn_beta_fast": 16.0,
        "yarn_beta_slow": 2.0,
        "attn_factor": 0.5,
    }
    write_gguf(path, fields={f"llama.rope.scaling.{k}": v for k, v in scaling.items()})
    rope = load(path).config.rope
    assert (rope.kind, rope.factor, rope.original_max_position_embeddings) == ("yarn", 4, 128)
    assert (rope.beta_fast, rope.beta_slow) == (16, 2)
    assert rope.attention_factor == pytest.approx(0.5 * (1 + 0.1 * math.log(4)))


def test_either_end_token_ends_generation(write_gguf, path):
    write_gguf(path, fields={"tokenizer.ggml.eot_token_id": 259})
    assert load(path).config.eos_token_ids == (261, 259)
    write_gguf(path, fields={"tokenizer.ggml.eot_token_id": 261})
    assert load(path).config.eos_token_ids == (261,)


def test_q8_0_and_q4_1_are_scale_times_code_plus_minimum(write_gguf, path):
    """The two layouts written out by hand: blocks of 32, float16 scales, low nibbles first."""
    for kind in (Kind.Q8_0, Kind.Q4_1):
        write_gguf(path, kind)
        raw = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
        rows = []
        for block in raw.data.reshape(-1, raw.data.shape[-1] // 2):  # two blocks a row of 64
            scale = float(block[:2].view(np.float16)[0])
            if kind == Kind.Q8_0:
                rows.append([scale * int(code) for code in block[2:].view(np.int8)])
            else:
                minimum, codes = float(block[2:4].view(np.float16)[0]), block[4:].astype(int)
                rows.append([scale * c + minimum for c in [*(codes & 15), *(codes >> 4)]])
        expected = torch.tensor(rows, dtype=torch.float64).reshape(96, 64)
        actual = load(path).weights.layers[0].w_up.double()
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
def test_float_matrices_stay_in_the_files_own_pages_but_for_reordered_heads(
    write_gguf, path, mapped_file, kind
):
    write_gguf(path, kind)
    weights = load(path).weights
    matrices = [weights.embedding, weights.lm_head]
    for layer in weights.layers:
        matrices += [layer.wv, layer.wo, layer.w_gate, layer.w_up, layer.w_down]
        assert mapped_file(layer.wq) is None
    assert [mapped_file(matrix) for matrix in matrices] == [str(path)] * len(matrices)


@EVERY_KIND
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_converts_any_kind(write_gguf, path, kind, dtype):
    original = write_gguf(path, kind)
    weights, wanted = load(path, dtype).weights, getattr(torch, dtype)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(weights.layers[1].w_down, rounded(original[name], kind).to(wanted))
    assert weights.embedding.dtype == wanted
    assert weights.layers[1].attn_norm.dtype == torch.float32


def test_a_gguf_file_and_a_hugging_face_folder_of_one_model_give_the_same_logits(
    write_gguf, path, tiny_folder, tmp_path, make_backend, all_logits
):
    from safetensors.torch import save_file

    original = write_gguf(path)
    folder = shutil.copytree(tiny_folder, tmp_path / "folder")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"vocab_size": 259', '"vocab_size": 262'))
    save_file(original, folder / "model.safetensors")
    span = SequenceInput(range(40), 0, [0, 1, 2], Phase.PREFILL, output_offsets=range(40))
    ours, theirs = (
        all_logits(make_backend(load_model(str(model))).forward(ForwardBatch([span])))
        for model in (path, folder)
    )
    assert torch.equal(ours, theirs)


def test_heads_wider_than_their_share_of_the_embedding_load(write_gguf, path):
    original = write_gguf(path, fields={"llama.attention.key_length": 24})
    model = load(path)
    assert model.config.head_dim == 24
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.weights.layers[0].wq, original[name])


def llama3_factors(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """`generate_extra_tensors` of llama.cpp's converter, class LlamaModel."""
    frequencies = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    low = rope.original_max_position_embeddings / rope.low_freq_factor
    high = rope.original_max_position_embeddings / rope.high_freq_factor
    factors = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope.factor)
        else:
            smooth = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
                rope.high_freq_factor - rope.low_freq_factor
            )
            factors.append(1 / ((1 - smooth) / rope.factor + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize(
    "rope",
    [RopeConfig(10000.0, "llama3", 8.0, 1.0, 4.0, 64), RopeConfig(5e5, "llama3", 32.0, 1.0, 4.0)],
    ids=["short", "llama 3.2"],
)
def test_rope_factors_of_a_file_are_the_llama3_scaling_of_hugging_face(write_gguf, path, rope):
    factors = llama3_factors(rope, head_dim=64)
    assert len({*factors.tolist()}) > 2, "kept, divided and in between"
    write_gguf(
        path,
        hidden=128,
        heads=2,
        kv_heads=1,
        fields={"llama.rope.freq_base": rope.theta},
        extra={"rope_freqs.weight": factors},
    )
    model = load(path)
    assert model.config.rope == RopeConfig(rope.theta)
    actual = rope_frequencies(model.config.rope, 64, model.weights.rope_factors)
    torch.testing.assert_close(actual, rope_frequencies(rope, 64), atol=0, rtol=1e-5)


def test_the_backend_uses_the_factors_of_a_file(write_gguf, path, make_backend, all_logits):
    span = SequenceInput(range(30), 0, [0, 1], Phase.PREFILL, output_offsets=[29])
    logits = []
    for extra in ({}, {"rope_freqs.weight": np.full(8, 4.0, np.float32)}):
        write_gguf(path, extra=extra)
        logits.append(all_logits(make_backend(load(path)).forward(ForwardBatch([span]))))
    assert not torch.allclose(*logits, atol=1e-3)
    write_gguf(path, fields={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    linear = all_logits(make_backend(load(path)).forward(ForwardBatch([span])))
    torch.testing.assert_close(linear, logits[1], atol=1e-5, rtol=0)


# --- what is refused ---


@pytest.mark.parametrize(
    "factors",
    [np.ones(7), np.ones(16), np.zeros(8), np.full(8, -1.0), np.full(8, np.nan), np.ones((2, 4))],
    ids=["too few", "too many", "zero", "negative", "nan", "matrix"],
)
def test_rope_factors_that_cannot_be_are_corrupt_and_named(write_gguf, path, factors):
    write_gguf(path, extra={"rope_freqs.weight": factors.astype(np.float32)})
    with pytest.raises(CorruptCheckpoint, match=r"rope_freqs\.weight must hold 8 positive"):
        load(path)


@pytest.mark.parametrize(
    "name",
    ["token_embd.weight", "output_norm.weight", "blk.1.attn_q.weight", "blk.0.ffn_down.weight"],
)
def test_a_missing_tensor_is_named(write_gguf, path, name):
    write_gguf(path, drop=[name])
    with pytest.raises(CorruptCheckpoint, match=f"{name} is missing from {path}"):
        load(path)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_q.weight", (62, 64), "no 4 heads"),
        ("blk.1.attn_k.weight", (62,), "no 2 heads"),
        ("blk.1.attn_k.weight", (64,), r"\[64\].*\[32, 64\]"),
        ("blk.0.attn_q.weight", (128, 64), r"\[128, 64\].*\[64, 64\]"),
        ("blk.0.ffn_up.weight", (95, 64), r"\[95, 64\].*\[96, 64\]"),
        ("token_embd.weight", (262, 32), r"\[262, 32\].*\[262, 64\]"),
    ],
)
def test_a_tensor_of_another_shape_is_named(write_gguf, path, name, shape, expected):
    write_gguf(path, drop=[name], extra={name: np.zeros(shape, np.float32)})
    with pytest.raises(CorruptCheckpoint, match=f"{name}.*{expected}"):
        load(path)


def test_integer_tensors_are_unsupported_and_named(write_gguf, path):
    name = "blk.0.ffn_up.weight"
    write_gguf(path, drop=[name], extra={name: np.zeros((96, 64), np.int8)})
    with pytest.raises(UnsupportedModel, match=f"{name} has type I8.*Q4_K"):
        load(path)


def test_biases_of_the_feed_forward_are_unsupported_and_named(write_gguf, path):
    write_gguf(path, extra={"blk.0.ffn_up.bias": np.zeros(96, np.float32)})
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.ffn_up\.bias"):
        load(path)


def test_a_bias_of_q_alone_is_corrupt(write_gguf, path):
    write_gguf(path, extra={"blk.0.attn_q.bias": np.zeros(64, np.float32)})
    with pytest.raises(CorruptCheckpoint, match=r"blk\.0\.attn_k\.bias is missing"):
        load(path)


@pytest.mark.parametrize(
    ("fields", "error", "named"),
    [
        (
            {"general.architecture": "gpt2"},
            UnsupportedModel,
            "'gpt2'.*supported: llama, qwen2, qwen3",
        ),
        ({"llama.attention.sliding_window": 64}, UnsupportedModel, "sliding_window.*Hugging Face"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 0.5},
            UnsupportedModel,
            "yarn_ext_factor 0.5",
        ),
        ({"llama.block_count": None}, CorruptCheckpoint, "llama.block_count is missing"),
        ({"llama.block_count": 2**31 - 1}, CorruptCheckpoint, "blk.2.attn_norm.weight is missing"),
        ({"llama.embedding_length": 2**40}, CorruptCheckpoint, "hidden_size is 1099511627776"),
        ({"llama.feed_forward_length": -1}, CorruptCheckpoint, "intermediate_size is -1"),
        ({"llama.rope.dimension_count": 8}, UnsupportedModel, "dimension_count is 8"),
        ({"tokenizer.ggml.model": "rwkv"}, UnsupportedModel, "'rwkv'.*Hugging Face folder"),
        ({"tokenizer.ggml.pre": "viking"}, UnsupportedModel, "'viking'.*smollm.*Hugging Face"),
        ({"tokenizer.ggml.model": "llama"}, CorruptCheckpoint, "tokenizer.ggml.scores"),
        ({"tokenizer.ggml.merges": None}, CorruptCheckpoint, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["ab"]}, CorruptCheckpoint, "tokenizer"),
        ({"tokenizer.ggml.merges": ["a q?"]}, CorruptCheckpoint, "tokenizer"),
        ({"tokenizer.ggml.merges": [1, 2]}, CorruptCheckpoint, "tokenizer"),
        ({"tokenizer.ggml.token_type": [3] * 400}, CorruptCheckpoint, "tokenizer"),
        ({"tokenizer.ggml.token_type": 3}, CorruptCheckpoint, "tokenizer"),
        ({"tokenizer.ggml.tokens": ["a"] * 262}, CorruptCheckpoint, "tokenizer"),
        ({"tokenizer.ggml.tokens": [1] * 262}, CorruptCheckpoint, "tokenizer"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, CorruptCheckpoint, "outside the vocabulary of 2"),
        ({"tokenizer.ggml.eos_token_id": 262}, CorruptCheckpoint, "id 262 is outside"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_metadata_that_cannot_be_is_refused_by_file_and_name(
    write_gguf, path, fields, error, named
):
    write_gguf(path, fields=fields)
    with pytest.raises(error, match=named) as refused:
        load(path)
    if "is missing" not in str(refused.value) and error is CorruptCheckpoint:
        assert str(path) in str(refused.value)


@pytest.mark.parametrize("data", [b"", b"GGU", b"GGML" * 100, b"\0" * 100], ids=repr)
def test_a_file_without_the_magic_is_corrupt(path, data):
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=f"{path} does not start with the GGUF magic"):
        load(path)


@pytest.mark.parametrize("version", [0, 1, 4, 2**32 - 1])
def test_an_unknown_version_is_corrupt(write_gguf, path, version):
    write_gguf(path)
    data = path.read_bytes()
    path.write_bytes(data[:4] + struct.pack("<I", version) + data[8:])
    with pytest.raises(CorruptCheckpoint, match=str(path)):
        load(path)


@pytest.fixture(scope="module")
def small_gguf(write_gguf, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, hidden=32, intermediate=32, layers=1, heads=2, kv_heads=1, tied=True)
    return path.read_bytes()


def header_bytes(data: bytes) -> int:
    return data.index(b"token_embd.weight")  # the first tensor's name: the metadata ends before it


@pytest.mark.timeout(60)
def test_a_file_cut_anywhere_is_corrupt_and_named(small_gguf, path):
    header = header_bytes(small_gguf)
    ends = [
        *range(4, 200, 7),
        *range(200, header + 700, 211),
        *range(header, len(small_gguf), 4001),
    ]
    for end in [*ends, len(small_gguf) - 1]:
        path.write_bytes(small_gguf[:end])
        with pytest.raises(CorruptCheckpoint, match=str(path)):
            load(path)


def field(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


UINT32, STRING, ARRAY = 4, 8, 9


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("tensors", "fields", "rest"),
    [
        (2**63, 0, b""),
        (0, 2**63, b""),
        (0, 1, struct.pack("<Q", 2**63)),
        (0, 1, field("a", STRING, struct.pack("<Q", 2**62))),
        (0, 1, field("a", ARRAY, struct.pack("<IQ", UINT32, 2**60))),
        (0, 1, field("a", ARRAY, struct.pack("<IQ", STRING, 2**60))),
        (0, 1, field("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000)),
        (0, 1, field("a", 77, b"")),
        (0, 2, field("a", UINT32, b"\0" * 4) * 2),
        (0, 1, field("general.alignment", UINT32, b"\0" * 4)),
        (1, 0, struct.pack("<Q1sI", 1, b"t", 2**31)),
        (1, 0, struct.pack("<Q1sIQIQ", 1, b"t", 1, 2**60, 0, 0)),
        (1, 0, struct.pack("<Q1sIQQIQ", 1, b"t", 2, 2**33, 2**33, 0, 0)),
        (1, 0, struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 99, 0)),
        (1, 0, struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 2**64 - 1)),
        (1, 0, struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 2**40)),
        (1, 0, struct.pack("<Q1sIQIQ", 1, b"\xff", 1, 0, 0, 0)),
    ],
    ids=[
        "many tensors",
        "many fields",
        "long key",
        "long string",
        "long array of numbers",
        "long array of strings",
        "arrays in arrays",
        "unknown type",
        "two fields of one name",
        "alignment 0",
        "many dimensions",
        "large tensor",
        "dimensions that overflow",
        "unknown tensor type",
        "offset that overflows",
        "offset past the end",
        "name that is not UTF-8",
    ],
)
def test_lengths_that_lie_end_in_an_error_not_in_a_loop(path, tensors, fields, rest):
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest + b"\0" * 64)
    with pytest.raises(CorruptCheckpoint, match=f"{path} is damaged or truncated"):
        GGUFCheckpoint(path)


@given(
    share=st.floats(0, 1, exclude_max=True),
    flips=st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from([0, 1, 7, 8, 9, 64, 128, 255])), max_size=4
    ),
)
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.timeout(60)
def test_any_damage_to_the_header_gives_weights_or_a_model_error(
    small_gguf, tmp_path_factory, share, flips
):
    data = bytearray(small_gguf)
    start = 4 + int(share * (header_bytes(small_gguf) + 600))  # into the tensors' descriptions
    for at, value in flips:
        data[start + at] = value
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.unlink(missing_ok=True)  # a mapping of the last example may still be alive
    path.write_bytes(data)
    try:
        load(path)
    except ModelError as error:
        assert str(error)  # noqa: PT017


# --- tokenizer and chat template ---


def test_the_tokenizer_splits_digits_merges_and_knows_special_tokens(write_gguf, path):
    write_gguf(path)
    model = load(path)
    assert model.tokenizer.encode("12").tokens == ["1", "2"], "though 12 is a merge"
    assert model.tokenizer.encode("ab ab").tokens == ["ab", "Ġab"]
    encoded = model.tokenizer.encode("<|im_start|>ab<|im_end|>")
    assert encoded.tokens == ["<|im_start|>", "ab", "<|im_end|>"]
    assert encoded.ids[0] == 260
    assert model.tokenizer.decode(encoded.ids) == "ab"
    assert model.chat_template == "{{ messages[0].content }}"
    assert model.config.bos_token_id == 260
    assert model.config.eos_token_ids == (261,)


def test_gpt2_tokenizers_do_not_split_digits(write_gguf, path):
    write_gguf(path, fields={"tokenizer.ggml.pre": "gpt-2"})
    assert load(path).tokenizer.encode("12").tokens == ["12"]


def test_user_defined_tokens_parse_but_are_no_special_ones(write_gguf, path):
    write_gguf(path, fields={"tokenizer.ggml.token_type": [1] * 259 + [4, 3, 3]})
    tokenizer = load(path).tokenizer
    ids = tokenizer.encode("ab<|endoftext|>").ids
    assert ids[-1] == 259
    assert tokenizer.decode(ids) == "ab<|endoftext|>"


def test_a_file_without_a_chat_template_has_none(write_gguf, path):
    write_gguf(path, fields={"tokenizer.chat_template": None})
    assert load(path).chat_template is None


def test_demo_tokenizer_splits_numbers_into_digits(demo_model):
    assert demo_model.tokenizer.encode("2026").tokens == ["2", "0", "2", "6"]
    assert demo_model.tokenizer.encode("in 10").tokens == ["in", "Ġ", "1", "0"]


def test_demo_special_tokens_parse_as_one_and_are_left_out_of_text(demo_model):
    ids = demo_model.tokenizer.encode("<|im_start|>user\nHi<|im_end|>").ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert demo_model.config.eos_token_ids == (2,)
    assert demo_model.tokenizer.decode(ids) == "user\nHi"


def test_demo_tokenizer_covers_the_embedding(demo_model):
    ids = demo_model.tokenizer.get_vocab().values()
    assert sorted(ids) == list(range(demo_model.config.vocab_size))


# Its vocabulary lacks the bytes of some control characters and of the empty planes above.
SPELLABLE = st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"])


def test_demo_tokenizer_gives_back_any_text(demo_model):
    tokenizer = demo_model.tokenizer

    @given(st.text(SPELLABLE | st.sampled_from("\n\t\r 0123456789"), max_size=80))
    @settings(max_examples=200, deadline=None)
    def holds(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text

    holds()


def test_demo_chat_template_is_there(demo_model):
    assert "<|im_start|>" in demo_model.chat_template
    assert "add_generation_prompt" in demo_model.chat_template
