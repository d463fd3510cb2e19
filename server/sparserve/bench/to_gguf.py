"""A model in memory as a GGUF file, which llama.cpp loads as well as we do."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

from sparserve.bench.gguf_vocabulary import vocabulary_fields
from sparserve.errors import ConfigError, UnsupportedModel
from sparserve.model.config import FAMILIES, ModelConfig
from sparserve.model.llama import rope_frequencies
from sparserve.model.loader import LoadedModel
from sparserve.model.rope import RopeConfig
from sparserve.model.weights import GGUF_NAMES, layer_shapes

_KINDS = {
    "float32": (torch.float32, GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bfloat16": (torch.bfloat16, GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "float16": (torch.float16, GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
}
GGUF_DTYPES = tuple(_KINDS)


def write_gguf(model: LoadedModel, path: Path, dtype: str) -> None:
    """Write `model` with its matrices in `dtype`, one of GGUF_DTYPES; vectors stay float32, as
    llama.cpp has them. The file appears whole or not at all.

    Raises UnsupportedModel of what llama.cpp has no word for, ConfigError where `path` cannot be
    written.
    """
    _refuse_what_has_no_counterpart(model.config)
    writer = GGUFWriter(None, FAMILIES[model.config.architecture].gguf)
    _add_fields(writer, _hyperparameters(model.config, writer.arch))
    _add_fields(writer, vocabulary_fields(model.tokenizer, model.config))
    writer.add_name(model.name)
    writer.add_file_type(_KINDS[dtype][2])
    if model.chat_template:
        writer.add_chat_template(model.chat_template)
    for name, tensor in _tensors(model):
        kept, kind = _kept(tensor, dtype)
        size = tensor.numel() * kept.itemsize
        # The numpy dtype counts only where `raw_dtype` does not say.
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            unfinished = Path(scratch) / path.name
            with closing(writer):
                writer.write_header_to_file(unfinished)
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for _, tensor in _tensors(model):
                    writer.write_tensor_data(_bits(tensor.cpu().to(_kept(tensor, dtype)[0])))
            unfinished.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error


def _kept(tensor: torch.Tensor, dtype: str) -> tuple[torch.dtype, GGMLQuantizationType]:
    torch_dtype, kind, _ = _KINDS["float32" if tensor.dim() == 1 else dtype]
    return torch_dtype, kind


def _bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """numpy has no bfloat16; 16-bit integers carry the same bytes."""
    whole = tensor.contiguous()
    return (whole.view(torch.int16) if whole.dtype == torch.bfloat16 else whole).numpy()


def _refuse_what_has_no_counterpart(config: ModelConfig) -> None:
    if config.sliding_layers:
        raise UnsupportedModel(
            f"llama.cpp has no sliding window for {config.architecture}; its file would attend to everything"
        )
    if config.layer_sizes:
        raise UnsupportedModel(
            "layers of this model differ in heads or neurons, and a GGUF file is written for layers alike alone; "
            "compress it with prune.allocation uniform and shares that leave all layers as many"
        )
    biases = [name for name in ("output", "down") if getattr(config, f"{name}_bias")]
    if biases and (arch := FAMILIES[config.architecture].gguf) != "llama":
        raise UnsupportedModel(
            f"llama.cpp has no bias of {' and '.join(biases)} for {arch}, and this model does; where pruning "
            "added it, compress with prune.restore none"
        )
    rope = config.rope
    if rope.kind == "dynamic":
        raise UnsupportedModel("llama.cpp has no RoPE of the kind dynamic")
    # GGUF has names for these numbers, but llama.cpp does not read them for these architectures.
    if rope.kind == "yarn" and (rope.beta_fast, rope.beta_slow, rope.truncate) != (32, 1, True):
        raise UnsupportedModel(
            f"llama.cpp runs yarn with beta_fast 32, beta_slow 1 and truncation alone; this model has "
            f"{rope.beta_fast:g}, {rope.beta_slow:g} and truncate={str(rope.truncate).lower()}"
        )


def _hyperparameters(config: ModelConfig, arch: str) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope.theta,
        "vocab_size": config.vocab_size,
        **{f"rope.scaling.{key}": value for key, value in _rope_scaling(config.rope).items()},
    }
    return {f"{arch}.{key}": value for key, value in fields.items()}


def _rope_scaling(rope: RopeConfig) -> dict[str, Any]:
    """llama3's stands in a tensor of its own."""
    if rope.kind == "linear":
        return {"type": "linear", "factor": rope.factor}
    if rope.kind == "yarn":
        # llama.cpp multiplies its own temperature (arXiv 2309.00071, equation 22) by attn_factor.
        temperature = 0.1 * math.log(rope.factor) + 1
        return {
            "type": "yarn",
            "factor": rope.factor,
            "original_context_length": rope.original_max_position_embeddings,
            "attn_factor": rope.attention_factor / temperature,
        }
    return {}


def _add_fields(writer: GGUFWriter, fields: dict[str, Any]) -> None:
    for key, value in fields.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)


def _tensors(model: LoadedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) in the order of the file; a tied LM head is the embedding and left out."""
    config, weights = model.config, model.weights
    yield GGUF_NAMES.embedding, weights.embedding
    heads = {}
    if FAMILIES[config.architecture].gguf_interleaved:
        heads = {"wq": config.num_heads, "bq": config.num_heads}
        heads |= {"wk": config.num_kv_heads, "bk": config.num_kv_heads}
    for index, layer in enumerate(weights.layers):
        for field in layer_shapes(config, index):
            tensor = getattr(layer, field)
            name = GGUF_NAMES.layer[field].format(i=index)
            yield name, _interleaved(tensor, heads[field]) if field in heads else tensor
    yield GGUF_NAMES.norm, weights.norm
    if not config.tie_word_embeddings:
        yield GGUF_NAMES.lm_head, weights.lm_head
    if (factors := _rope_factors(model)) is not None:
        yield "rope_freqs.weight", factors


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q/k [heads * head_dim, ...] as llama.cpp has them: the two halves of each head interleaved."""
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _rope_factors(model: LoadedModel) -> torch.Tensor | None:
    """GGUF's form of llama3 scaling: divisors of the frequencies, [head_dim / 2]."""
    rope, head_dim = model.config.rope, model.config.head_dim
    if rope.kind == "llama3":
        return rope_frequencies(RopeConfig(rope.theta), head_dim) / rope_frequencies(rope, head_dim)
    return model.weights.rope_factors
