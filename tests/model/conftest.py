"""What the model tests share: checkpoints of odd kinds, GGUF files, and backends to run them.

The GGUF files written here follow llama.cpp's converter (`convert_hf_to_gguf.py`, class LlamaModel),
not our reader.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # before transformers is imported: nothing here may need a network
)

from sparse_kernels.formats import DecoderFormats
from sparserve.model.backend import Backend, ForwardOutput
from sparserve.model.loader import LoadedModel
from sparserve.model.native import NativeBackend
from sparserve.model.packing import make_decoder
from sparserve.model.reference import ReferenceBackend

BFLOAT16_MODEL = DecoderFormats()
MERGES = ["a b", "Ġ ab", "1 2"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GGUF_OF_HF = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine two are ten times slower
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_backend() -> Callable[..., Backend]:
    """`make_backend(model, num_blocks=…)`: a reference backend; with `kind="cpu"` the native one."""

    def make(
        model: LoadedModel,
        num_blocks: int = 64,
        threads: int = 1,
        kind: str = "reference",
        formats: DecoderFormats = BFLOAT16_MODEL,
    ) -> Backend:
        if kind == "cpu":
            decoder = make_decoder(model.config, model.weights, formats, threads=threads)
            return NativeBackend(model.config, decoder, num_blocks=num_blocks)
        return ReferenceBackend(model.config, model.weights, num_blocks=num_blocks, threads=threads)

    return make


@pytest.fixture(scope="session")
def all_logits() -> Callable[[ForwardOutput], torch.Tensor]:
    """`all_logits(output)`: the whole rows [rows, vocab] of an output."""

    def stack(output: ForwardOutput) -> torch.Tensor:
        rows = len(output.candidates.token_ids)
        return torch.stack([output.candidates.full_logits(row).clone() for row in range(rows)])

    return stack


@pytest.fixture(scope="session")
def mapped_file() -> Callable[[torch.Tensor], str | None]:
    """`mapped_file(tensor)`: the file whose mapping holds the tensor's memory, None for the heap."""

    def find(tensor: torch.Tensor) -> str | None:
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, _, _, _, _, *name = line.split(maxsplit=5)
            first, last = (int(address, 16) for address in span.split("-"))
            if first <= tensor.data_ptr() < last:
                return name[0] if name and name[0].startswith("/") else None
        raise AssertionError("the tensor is in no mapping")

    return find


def smollm_vocabulary() -> list[str]:
    """Every byte, three merged tokens, three special ones: 262 in all."""
    return [*sorted(gguf_byte_alphabet()), "ab", "Ġab", "12", *SPECIALS]


def gguf_byte_alphabet() -> Sequence[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


def gguf_name(hf_name: str) -> str:
    if hf_name in GGUF_OF_HF:
        return GGUF_OF_HF[hf_name]
    layer, part = hf_name.removeprefix("model.layers.").split(".", 1)
    module, _, kind = part.rpartition(".")
    return f"blk.{layer}.{GGUF_OF_HF[module]}.{kind}"


def interleave_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's converter."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def gguf_shapes(
    vocab: int,
    hidden: int,
    intermediate: int,
    layers: int,
    q_width: int,
    kv_width: int,
    head_norm: int,
    attention_bias: bool,
) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor name -> shape; `head_norm` is the width of q_norm and k_norm, 0 for none."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        layer = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q_width, hidden),
            "self_attn.k_proj.weight": (kv_width, hidden),
            "self_attn.v_proj.weight": (kv_width, hidden),
            "self_attn.o_proj.weight": (hidden, q_width),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (intermediate, hidden),
            "mlp.up_proj.weight": (intermediate, hidden),
            "mlp.down_proj.weight": (hidden, intermediate),
        }
        if attention_bias:
            layer |= {
                f"self_attn.{p}_proj.bias": (q_width if p == "q" else kv_width,) for p in "qkv"
            }
        if head_norm:
            layer |= {f"self_attn.{p}_norm.weight": (head_norm,) for p in "qk"}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., dict[str, torch.Tensor]]:
    """`write_gguf(path, …)`: a random model with the smollm tokenizer as a GGUF file.

    Returns the weights under Hugging Face names, as they were before the file's own rounding.
    `kind` stores the matrices; norms stay F32, as llama.cpp keeps them. `fields` changes or, with
    None, leaves out metadata; `extra` adds tensors (or pairs of raw data and its kind); `drop`
    leaves some out.
    """

    def write(
        path: Path,
        kind: GGMLQuantizationType = GGMLQuantizationType.F32,
        *,
        architecture: str = "llama",
        attention_bias: bool = False,
        tied: bool = False,
        seed: int = 0,
        hidden: int = 64,
        intermediate: int = 96,
        layers: int = 2,
        heads: int = 4,
        kv_heads: int = 2,
        fields: dict[str, Any] | None = None,
        extra: dict[str, np.ndarray | tuple[np.ndarray, GGMLQuantizationType]] | None = None,
        drop: Sequence[str] = (),
    ) -> dict[str, torch.Tensor]:
        tokens = smollm_vocabulary()
        head_dim = (fields or {}).get(f"{architecture}.attention.key_length", hidden // heads)
        norm = head_dim if architecture == "qwen3" else 0
        q_width, kv_width = heads * head_dim, kv_heads * head_dim
        shapes = gguf_shapes(
            len(tokens), hidden, intermediate, layers, q_width, kv_width, norm, attention_bias
        )
        if tied:
            del shapes["lm_head.weight"]
        random = np.random.default_rng(seed)
        weights = {
            name: random.standard_normal(shape).astype(np.float32) * shape[-1] ** -0.5
            + (len(shape) == 1)
            for name, shape in shapes.items()
        }

        hyperparameters = {
            "block_count": layers,
            "context_length": 512,
            "embedding_length": hidden,
            "feed_forward_length": intermediate,
            "attention.head_count": heads,
            "attention.head_count_kv": kv_heads,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": head_dim,
            "rope.freq_base": 10000.0,
        }
        metadata = {f"{architecture}.{key}": value for key, value in hyperparameters.items()} | {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3] * 3,
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.bos_token_id": len(tokens) - 2,
            "tokenizer.ggml.eos_token_id": len(tokens) - 1,
            "tokenizer.chat_template": "{{ messages[0].content }}",
        }
        metadata |= fields or {}
        writer = gguf.GGUFWriter(path, str(metadata.pop("general.architecture", architecture)))
        for key, value in metadata.items():
            add_field(writer, key, value)
        for name, weight in weights.items():
            if gguf_name(name) in drop:
                continue
            for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
                if part in name and architecture == "llama":
                    weight = interleave_halves(weight, count)
            add_tensor(writer, gguf_name(name), weight, kind)
        for name, value in (extra or {}).items():
            data, raw_kind = value if isinstance(value, tuple) else (value, None)
            writer.add_tensor(name, data, raw_dtype=raw_kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {name: torch.from_numpy(weight) for name, weight in weights.items()}

    return write


def add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            pass
        case str():
            writer.add_string(key, value)
        case bool():
            writer.add_bool(key, value)
        case float():
            writer.add_float32(key, value)
        case int():
            (writer.add_uint32 if 0 <= value < 2**32 else writer.add_int64)(key, value)
        case list():
            writer.add_array(key, value)


def add_tensor(
    writer: gguf.GGUFWriter, name: str, weight: np.ndarray, kind: GGMLQuantizationType
) -> None:
    if weight.ndim == 1 or kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, weight)
    elif kind == GGMLQuantizationType.F16:
        writer.add_tensor(name, weight.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
