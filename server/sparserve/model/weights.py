"""The weights of a Llama-family decoder, named as the mathematics names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain

import torch

from sparserve.errors import CorruptCheckpoint
from sparserve.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; matrices are [out_features, in_features]."""

    attn_norm: torch.Tensor  # [hidden]
    wq: torch.Tensor  # [num_heads * head_dim, hidden]
    wk: torch.Tensor  # [num_kv_heads * head_dim, hidden]
    wv: torch.Tensor  # [num_kv_heads * head_dim, hidden]
    wo: torch.Tensor  # [hidden, num_heads * head_dim]
    mlp_norm: torch.Tensor  # [hidden]
    w_gate: torch.Tensor  # [intermediate, hidden]
    w_up: torch.Tensor  # [intermediate, hidden]
    w_down: torch.Tensor  # [hidden, intermediate]
    # None where the architecture has none.
    bq: torch.Tensor | None = None  # [num_heads * head_dim]
    bk: torch.Tensor | None = None  # [num_kv_heads * head_dim]
    bv: torch.Tensor | None = None  # [num_kv_heads * head_dim]
    bo: torch.Tensor | None = None  # [hidden]
    bd: torch.Tensor | None = None  # [hidden]
    q_norm: torch.Tensor | None = None  # [head_dim]
    k_norm: torch.Tensor | None = None  # [head_dim]

    def to(self, device: torch.device) -> LayerWeights:
        """The same on `device`; shares what is there already."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: t.to(device) for k, t in tensors.items() if t is not None})


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embedding: torch.Tensor  # [vocab, hidden]
    layers: Sequence[LayerWeights]
    norm: torch.Tensor  # [hidden]
    lm_head: torch.Tensor  # [vocab, hidden]; the embedding itself where tied
    rope_factors: torch.Tensor | None = None  # [head_dim / 2], GGUF's form of llama3 scaling

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Where a file format keeps each weight; `{i}` is the layer."""

    embedding: str
    norm: str
    lm_head: str
    layer: Mapping[str, str]  # LayerWeights field -> name


HF_NAMES = TensorNames(
    embedding="model.embed_tokens.weight",
    norm="model.norm.weight",
    lm_head="lm_head.weight",
    layer={
        "attn_norm": "model.layers.{i}.input_layernorm.weight",
        "wq": "model.layers.{i}.self_attn.q_proj.weight",
        "wk": "model.layers.{i}.self_attn.k_proj.weight",
        "wv": "model.layers.{i}.self_attn.v_proj.weight",
        "wo": "model.layers.{i}.self_attn.o_proj.weight",
        "mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
        "w_gate": "model.layers.{i}.mlp.gate_proj.weight",
        "w_up": "model.layers.{i}.mlp.up_proj.weight",
        "w_down": "model.layers.{i}.mlp.down_proj.weight",
        "bq": "model.layers.{i}.self_attn.q_proj.bias",
        "bk": "model.layers.{i}.self_attn.k_proj.bias",
        "bv": "model.layers.{i}.self_attn.v_proj.bias",
        "bo": "model.layers.{i}.self_attn.o_proj.bias",
        "bd": "model.layers.{i}.mlp.down_proj.bias",
        "q_norm": "model.layers.{i}.self_attn.q_norm.weight",
        "k_norm": "model.layers.{i}.self_attn.k_norm.weight",
    },
)

GGUF_NAMES = TensorNames(
    embedding="token_embd.weight",
    norm="output_norm.weight",
    lm_head="output.weight",
    layer={
        "attn_norm": "blk.{i}.attn_norm.weight",
        "wq": "blk.{i}.attn_q.weight",
        "wk": "blk.{i}.attn_k.weight",
        "wv": "blk.{i}.attn_v.weight",
        "wo": "blk.{i}.attn_output.weight",
        "mlp_norm": "blk.{i}.ffn_norm.weight",
        "w_gate": "blk.{i}.ffn_gate.weight",
        "w_up": "blk.{i}.ffn_up.weight",
        "w_down": "blk.{i}.ffn_down.weight",
        "bq": "blk.{i}.attn_q.bias",
        "bk": "blk.{i}.attn_k.bias",
        "bv": "blk.{i}.attn_v.bias",
        "bo": "blk.{i}.attn_output.bias",
        "bd": "blk.{i}.ffn_down.bias",
        "q_norm": "blk.{i}.attn_q_norm.weight",
        "k_norm": "blk.{i}.attn_k_norm.weight",
    },
)


def step_weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of weights that a dense decode step reads: all but the embedding, of which it takes one
    row; a tied one is read as LM head. Matrices in `dtype`, vectors in float32.
    """
    layers = (layer_shapes(config, index).values() for index in range(config.num_layers))
    shapes = [*chain.from_iterable(layers), (config.vocab_size, config.hidden_size)]
    vectors = sum(shape[0] for shape in shapes if len(shape) == 1) + config.hidden_size
    matrices = sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    return matrices * dtype.itemsize + vectors * torch.float32.itemsize


def layer_shapes(config: ModelConfig, index: int) -> dict[str, tuple[int, ...]]:
    """LayerWeights field -> shape, of the fields that `config` asks for in layer `index`."""
    size = config.layer(index)
    d, i = config.hidden_size, size.intermediate_size
    q, kv = size.num_heads * config.head_dim, size.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (d,),
        "wq": (q, d),
        "wk": (kv, d),
        "wv": (kv, d),
        "wo": (d, q),
        "mlp_norm": (d,),
        "w_gate": (i, d),
        "w_up": (i, d),
        "w_down": (d, i),
    }
    if config.qkv_bias:
        shapes |= {"bq": (q,), "bk": (kv,), "bv": (kv,)}
    if config.output_bias:
        shapes |= {"bo": (d,)}
    if config.down_bias:
        shapes |= {"bd": (d,)}
    if config.qk_norm:
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    return shapes


# read(name) returns the tensor in the dtype to compute with, or raises CorruptCheckpoint.
Read = Callable[[str], torch.Tensor]


def read_layer(config: ModelConfig, names: TensorNames, read: Read, index: int) -> LayerWeights:
    """One layer, its shapes checked. Raises CorruptCheckpoint."""
    return LayerWeights(
        **{
            field: _checked(read, names.layer[field].format(i=index), shape)
            for field, shape in layer_shapes(config, index).items()
        }
    )


def assemble(
    config: ModelConfig,
    names: TensorNames,
    read: Read,
    layers: Callable[[], Sequence[LayerWeights]],
    rope_factors: torch.Tensor | None = None,
) -> ModelWeights:
    """All weights, `layers()` among them, their shapes checked. Raises CorruptCheckpoint."""
    vocab = (config.vocab_size, config.hidden_size)
    embedding = _checked(read, names.embedding, vocab)
    return ModelWeights(
        embedding=embedding,
        layers=layers(),
        norm=_checked(read, names.norm, (config.hidden_size,)),
        lm_head=embedding if config.tie_word_embeddings else _checked(read, names.lm_head, vocab),
        rope_factors=rope_factors,
    )


def _checked(read: Read, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = read(name)
    if tuple(tensor.shape) != shape:
        raise CorruptCheckpoint(
            f"tensor {name} has shape {list(tensor.shape)}, the config asks for {list(shape)}"
        )
    return tensor
