"""What a decoder looks like, in our names, whatever file it came from.

Foreign names are translated here once; `FAMILIES` is the list of architectures that can be run.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sparserve.errors import CorruptCheckpoint, UnsupportedModel
from sparserve.model.fields import Fields
from sparserve.model.rope import RopeConfig


@dataclass(frozen=True, slots=True)
class Family:
    """How an architecture differs from Llama."""

    gguf: str  # `general.architecture`
    qkv_bias: bool = False  # q, k and v always have biases; else where config or file say so
    qk_norm: bool = False  # RMSNorm over each head of q and k, before RoPE
    attention_bias: bool = False  # config.json's `attention_bias` (q, k, v and o) is heeded
    sliding_window: bool = False  # config.json's `sliding_window` is heeded
    gguf_interleaved: bool = False  # llama.cpp stores the halves of q and k heads interleaved
    # What transformers takes for a key that config.json leaves out, where it is not Llama's.
    defaults: Mapping[str, Any] = field(default_factory=dict)


_QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "use_sliding_window": False,
}
# Hugging Face architecture -> traits. Of several with one GGUF name, that name means the first.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", attention_bias=True, gguf_interleaved=True),
    "MistralForCausalLM": Family(
        "llama",
        sliding_window=True,
        gguf_interleaved=True,
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2", qkv_bias=True, sliding_window=True, defaults=_QWEN_DEFAULTS
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        qk_norm=True,
        attention_bias=True,
        sliding_window=True,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    ),
}


@dataclass(frozen=True, slots=True)
class LayerSize:
    """What layers of a pruned model may differ in."""

    num_heads: int
    num_kv_heads: int
    intermediate_size: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and constants of a decoder-only transformer with SwiGLU feed-forward.

    `intermediate_size` and numbers of heads are those of the largest layer; `layer` tells each layer's own.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False  # of the projection after attention
    down_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0  # positions that attention sees in `sliding_layers`, its own included
    sliding_layers: Sequence[int] = ()
    layer_sizes: tuple[LayerSize, ...] = ()  # of each layer; (): all are alike

    def __post_init__(self) -> None:
        for name in [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ]:
            value = getattr(self, name)
            if not 0 < value < 2**31:
                raise CorruptCheckpoint(f"{name} is {reprlib.repr(value)}; it must be in [1, 2^31)")
        if self.num_heads % self.num_kv_heads:
            raise CorruptCheckpoint(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise CorruptCheckpoint(f"head_dim {self.head_dim} is odd; RoPE needs pairs")
        if self.rope.kind == "dynamic" and self.head_dim < 4:
            raise CorruptCheckpoint(f"head_dim {self.head_dim} is too small for dynamic RoPE")
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps > 0):
            raise CorruptCheckpoint(f"rms_norm_eps is {self.rms_norm_eps}; it must be > 0")
        for token in (
            *self.eos_token_ids,
            *([] if self.bos_token_id is None else [self.bos_token_id]),
        ):
            if not 0 <= token < self.vocab_size:
                raise CorruptCheckpoint(
                    f"special token id {reprlib.repr(token)} is outside the vocabulary of {self.vocab_size}"
                )

    def pruned(self, sizes: Sequence[LayerSize]) -> ModelConfig:
        """The same model with layers of these sizes. Raises CorruptCheckpoint of sizes that cannot be."""
        if len(sizes) != self.num_layers:
            raise CorruptCheckpoint(f"{len(sizes)} layers have sizes, of {self.num_layers}")
        for index, (own, before) in enumerate(
            zip(sizes, map(self.layer, range(self.num_layers)), strict=True)
        ):
            if not (
                0 < own.num_kv_heads <= before.num_kv_heads
                and 0 < own.num_heads <= before.num_heads
                and own.num_heads % own.num_kv_heads == 0
                and 0 < own.intermediate_size <= before.intermediate_size
            ):
                raise CorruptCheckpoint(f"layer {index} cannot have {own}: it was {before}")
        return replace(
            self,
            num_heads=max(own.num_heads for own in sizes),
            num_kv_heads=max(own.num_kv_heads for own in sizes),
            intermediate_size=max(own.intermediate_size for own in sizes),
            layer_sizes=tuple(sizes) if len(set(sizes)) > 1 else (),
        )

    def with_biases(self, names: Collection[str]) -> ModelConfig:
        """The same model with those of `output`, of `down` or both too."""
        return replace(
            self,
            output_bias=self.output_bias or "output" in names,
            down_bias=self.down_bias or "down" in names,
        )

    def layer(self, index: int) -> LayerSize:
        if self.layer_sizes:
            return self.layer_sizes[index]
        return LayerSize(self.num_heads, self.num_kv_heads, self.intermediate_size)

    @property
    def layers(self) -> Iterator[LayerSize]:
        """Of all layers in order."""
        return map(self.layer, range(self.num_layers))

    def window(self, layer: int) -> int:
        """How many positions attention of `layer` sees, its own included; 0: all."""
        return self.sliding_window if layer in self.sliding_layers else 0

    @property
    def mlp_parameters(self) -> int:
        """Of the feed-forward layers alone."""
        return 3 * self.hidden_size * self.num_neurons

    @property
    def layer_neurons(self) -> tuple[int, ...]:
        """Of each feed-forward layer."""
        return tuple(own.intermediate_size for own in self.layers)

    @property
    def num_neurons(self) -> int:
        """Of all feed-forward layers together."""
        if not self.layer_sizes:  # numbers from outside may be large
            return self.num_layers * self.intermediate_size
        return sum(self.layer_neurons)

    @property
    def num_parameters(self) -> int:
        """All weights; a tied LM head counts once."""
        heads, kv_heads = self._num_heads_in_all
        attention = 2 * self.hidden_size * self.head_dim * (heads + kv_heads)
        attention += self.qkv_bias * self.head_dim * (heads + 2 * kv_heads)
        biases = self.output_bias + self.down_bias
        vectors = (2 + biases) * self.hidden_size + self.qk_norm * 2 * self.head_dim  # 2 norms
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        others = self.num_layers * vectors + embeddings + self.hidden_size
        return attention + self.mlp_parameters + others

    @property
    def _num_heads_in_all(self) -> tuple[int, int]:
        """(query heads, KV heads) of all layers together."""
        if not self.layer_sizes:
            return self.num_layers * self.num_heads, self.num_layers * self.num_kv_heads
        sizes = self.layer_sizes
        return sum(own.num_heads for own in sizes), sum(own.num_kv_heads for own in sizes)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
        """From `config.json`, with `generation_config.json` (or {}) for the EOS ids.

        Raises UnsupportedModel or CorruptCheckpoint.
        """
        named = raw.get("architectures")
        architectures = named if isinstance(named, list) else [named]
        architecture = next((name for name in FAMILIES if name in architectures), None)
        if architecture is None:
            raise UnsupportedModel(
                f"architecture {reprlib.repr(named) if named else '(none named)'} is not supported; "
                f"supported: {', '.join(FAMILIES)}"
            )
        if raw.get("hidden_act", "silu") != "silu":
            act = reprlib.repr(raw["hidden_act"])
            raise UnsupportedModel(f"hidden_act {act} is not supported; only silu")
        if float(raw.get("partial_rotary_factor") or 1) != 1:
            raise UnsupportedModel(
                f"partial_rotary_factor {raw['partial_rotary_factor']} is not supported; only 1"
            )
        if raw.get("mlp_bias"):
            raise UnsupportedModel("mlp_bias=true is not supported")
        family = FAMILIES[architecture]
        fields = Fields({**family.defaults, **raw})
        biased = family.attention_bias and fields.boolean("attention_bias", False)
        layers = fields.integer("num_hidden_layers")
        window, sliding_layers = _windows(fields, layers) if family.sliding_window else (0, ())
        heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
        trained = fields.integer("max_position_embeddings", 2048)
        rope = RopeConfig.from_hf(raw, trained)
        eos = Fields(generation if "eos_token_id" in generation else raw).ids("eos_token_id")
        return cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=fields.integer("num_key_value_heads", heads),
            head_dim=fields.integer("head_dim", hidden // max(heads, 1)),
            max_position_embeddings=rope.context(trained),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=rope,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            eos_token_ids=eos,
            bos_token_id=next(iter(fields.ids("bos_token_id")), None),
            qkv_bias=family.qkv_bias or biased,
            output_bias=biased,
            qk_norm=family.qk_norm,
            sliding_window=window,
            sliding_layers=sliding_layers,
        )

    def to_hf(self) -> dict[str, Any]:
        """As `config.json`, which `from_hf` reads to the same again. Raises UnsupportedModel where it has
        no words: a GGUF file may mix traits that no Hugging Face architecture has together.
        """
        family, rope = FAMILIES[self.architecture], self.rope
        raw = {
            "architectures": [self.architecture],
            "model_type": self.architecture.removesuffix("ForCausalLM").lower(),
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            # Of dynamic RoPE it is the context that is extended.
            "max_position_embeddings": rope.original_max_position_embeddings
            if rope.kind == "dynamic"
            else self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope.to_hf(),
            "attention_bias": self.output_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids) or None,
        }
        if family.sliding_window:
            raw |= self._windows_to_hf()
        own, again = asdict(self), asdict(ModelConfig.from_hf(raw, {}))
        lost = [f"{name} {reprlib.repr(own[name])}" for name in own if own[name] != again[name]]
        if lost:
            raise UnsupportedModel(
                f"config.json of {self.architecture} has no words for {', '.join(lost)}"
            )
        return raw

    def _windows_to_hf(self) -> dict[str, Any]:
        if not self.sliding_window:
            return {"use_sliding_window": False, "sliding_window": None}
        raw: dict[str, Any] = {"use_sliding_window": True, "sliding_window": self.sliding_window}
        if isinstance(self.sliding_layers, range):
            return raw | {"max_window_layers": self.sliding_layers.start}
        kinds = ("full_attention", "sliding_attention")
        sliding = [i in self.sliding_layers for i in range(self.num_layers)]
        return raw | {"layer_types": [kinds[own] for own in sliding]}

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], tensor_names: Set[str]) -> ModelConfig:
        """From GGUF metadata, and from which tensors the file has: it says of a tied LM head and of
        biases only by their presence. Raises UnsupportedModel or CorruptCheckpoint.
        """
        name = str(fields.get("general.architecture"))
        architecture = next((hf for hf, known in FAMILIES.items() if known.gguf == name), None)
        if architecture is None:
            supported = dict.fromkeys(family.gguf for family in FAMILIES.values())
            raise UnsupportedModel(
                f"GGUF architecture {reprlib.repr(name)} is not supported; "
                f"supported: {', '.join(supported)}"
            )
        family, read = FAMILIES[architecture], Fields(fields)
        heads = read.integer(f"{name}.attention.head_count")
        hidden, layers = (
            read.integer(f"{name}.embedding_length"),
            read.integer(f"{name}.block_count"),
        )
        head_dim = read.integer(f"{name}.attention.key_length", hidden // max(heads, 1))
        trained = read.integer(f"{name}.context_length")
        rope = RopeConfig.from_gguf(name, fields, trained)
        config = cls(
            architecture=architecture,
            vocab_size=len(read.array("tokenizer.ggml.tokens")),
            hidden_size=hidden,
            intermediate_size=read.integer(f"{name}.feed_forward_length"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=read.integer(f"{name}.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=rope.context(trained),
            rms_norm_eps=read.number(f"{name}.attention.layer_norm_rms_epsilon"),
            rope=rope,
            tie_word_embeddings="output.weight" not in tensor_names,
            eos_token_ids=tuple(
                dict.fromkeys(
                    [
                        *read.ids("tokenizer.ggml.eos_token_id"),
                        *read.ids("tokenizer.ggml.eot_token_id"),
                        *read.ids("tokenizer.ggml.eom_token_id"),
                    ]
                )
            ),
            bos_token_id=next(iter(read.ids("tokenizer.ggml.bos_token_id")), None),
            qkv_bias=family.qkv_bias or "blk.0.attn_q.bias" in tensor_names,
            output_bias="blk.0.attn_output.bias" in tensor_names,
            down_bias="blk.0.ffn_down.bias" in tensor_names,
            qk_norm=family.qk_norm,
        )
        rotated = read.integer(f"{name}.rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise UnsupportedModel(
                f"{name}.rope.dimension_count is {rotated}; only whole heads of {head_dim} are rotated"
            )
        if read.integer(f"{name}.attention.sliding_window", 0):
            raise UnsupportedModel(
                f"{name}.attention.sliding_window is not read from GGUF files, as llama.cpp does not "
                "for this architecture; use the model's Hugging Face folder"
            )
        return config


def _windows(fields: Fields, num_layers: int) -> tuple[int, Sequence[int]]:
    """(attention window, layers that have it); (0, ()) where none has.

    Some families switch it by `use_sliding_window`, and have it in the layers that `layer_types`
    names or, without that, from layer `max_window_layers` on.
    """
    kinds = fields.array("layer_types", [])
    unknown = [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]
    if unknown:
        raise UnsupportedModel(f"layer type {reprlib.repr(unknown[0])} is not supported")
    if kinds and len(kinds) != num_layers:
        raise CorruptCheckpoint(f"layer_types names {len(kinds)} layers of {num_layers}")
    sliding: Sequence[int] = range(fields.integer("max_window_layers", 0), num_layers)
    if kinds:
        sliding = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    if not fields.boolean("use_sliding_window", True) or "sliding_window" not in fields:
        if kinds and sliding:
            raise CorruptCheckpoint("layer_types names sliding_attention, but no window is in use")
        return 0, ()
    window = fields.integer("sliding_window")
    if not 0 < window < 2**31:
        raise CorruptCheckpoint(
            f"sliding_window is {reprlib.repr(window)}; it must be in [1, 2^31)"
        )
    return (window, sliding) if sliding else (0, ())
