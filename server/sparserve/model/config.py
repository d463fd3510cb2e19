"""What a decoder looks like, in our names, whatever file it came from.

Foreign names are translated here once; `FAMILIES` is the list of architectures that can be run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparserve.errors import CorruptCheckpoint, UnsupportedModel

# Hugging Face architecture -> GGUF `general.architecture`
FAMILIES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding and its context extension.

    `kind` is "default", "linear" (positions divided by `factor`) or "llama3" (Llama 3.1's
    per-frequency scaling, transformers `_compute_llama3_parameters`).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    KINDS = ("default", "linear", "llama3")

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise UnsupportedModel(
                f"RoPE type {self.kind!r} is not supported; supported: {', '.join(self.KINDS)}"
            )
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise CorruptCheckpoint(f"RoPE {name} is {value}; it must be finite and > 0")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise CorruptCheckpoint(
                f"RoPE high_freq_factor {self.high_freq_factor} must exceed "
                f"low_freq_factor {self.low_freq_factor}"
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and constants of a decoder-only transformer with SwiGLU feed-forward."""

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
                raise CorruptCheckpoint(f"{name} is {value}; it must be in [1, 2^31)")
        if self.num_heads % self.num_kv_heads:
            raise CorruptCheckpoint(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise CorruptCheckpoint(f"head_dim {self.head_dim} is odd; RoPE needs pairs")
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps > 0):
            raise CorruptCheckpoint(f"rms_norm_eps is {self.rms_norm_eps}; it must be > 0")
        for token in (
            *self.eos_token_ids,
            *([] if self.bos_token_id is None else [self.bos_token_id]),
        ):
            if not 0 <= token < self.vocab_size:
                raise CorruptCheckpoint(
                    f"special token id {token} is outside the vocabulary of {self.vocab_size}"
                )

    @property
    def num_parameters(self) -> int:
        """All weights; a tied LM head counts once."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        norms = 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp + norms) + embeddings + self.hidden_size

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
        """From `config.json`, with `generation_config.json` (or {}) for the EOS ids.

        Raises UnsupportedModel or CorruptCheckpoint.
        """
        architectures = raw.get("architectures") or []
        architecture = next((a for a in architectures if a in FAMILIES), None)
        if architecture is None:
            raise UnsupportedModel(
                f"architecture {architectures or '(none named)'} is not supported; "
                f"supported: {', '.join(FAMILIES)}"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise UnsupportedModel(f"hidden_act {raw['hidden_act']!r} is not supported; only silu")
        for biased in ("attention_bias", "mlp_bias"):
            if raw.get(biased):
                raise UnsupportedModel(f"{biased}=true is not supported yet")
        try:
            heads = int(raw["num_attention_heads"])
            eos = generation.get("eos_token_id", raw.get("eos_token_id"))
            return cls(
                architecture=architecture,
                vocab_size=int(raw["vocab_size"]),
                hidden_size=int(raw["hidden_size"]),
                intermediate_size=int(raw["intermediate_size"]),
                num_layers=int(raw["num_hidden_layers"]),
                num_heads=heads,
                num_kv_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // max(heads, 1)),
                max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
                rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                rope=_rope_from_hf(raw),
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
                eos_token_ids=_as_ids(eos),
                bos_token_id=raw.get("bos_token_id"),
            )
        except KeyError as error:
            raise CorruptCheckpoint(f"config.json has no {error.args[0]!r}") from error
        except (TypeError, ValueError) as error:
            raise CorruptCheckpoint(
                f"config.json has a value of the wrong type: {error}"
            ) from error

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], tie_word_embeddings: bool) -> ModelConfig:
        """From GGUF metadata. Raises UnsupportedModel or CorruptCheckpoint."""
        name = str(fields.get("general.architecture"))
        architecture = next((hf for hf, gguf in FAMILIES.items() if gguf == name), None)
        if architecture is None:
            raise UnsupportedModel(
                f"GGUF architecture {name!r} is not supported; "
                f"supported: {', '.join(FAMILIES.values())}"
            )
        try:
            heads = int(fields[f"{name}.attention.head_count"])
            hidden = int(fields[f"{name}.embedding_length"])
            eos = fields.get("tokenizer.ggml.eos_token_id")
            bos = fields.get("tokenizer.ggml.bos_token_id")
            return cls(
                architecture=architecture,
                vocab_size=len(fields["tokenizer.ggml.tokens"]),
                hidden_size=hidden,
                intermediate_size=int(fields[f"{name}.feed_forward_length"]),
                num_layers=int(fields[f"{name}.block_count"]),
                num_heads=heads,
                num_kv_heads=int(fields.get(f"{name}.attention.head_count_kv", heads)),
                head_dim=int(fields.get(f"{name}.attention.key_length", hidden // max(heads, 1))),
                max_position_embeddings=int(fields[f"{name}.context_length"]),
                rms_norm_eps=float(fields[f"{name}.attention.layer_norm_rms_epsilon"]),
                rope=_rope_from_gguf(name, fields),
                tie_word_embeddings=tie_word_embeddings,
                eos_token_ids=_as_ids(eos),
                bos_token_id=None if bos is None else int(bos),
            )
        except KeyError as error:
            raise CorruptCheckpoint(f"the GGUF metadata has no {error.args[0]!r}") from error
        except (TypeError, ValueError) as error:
            raise CorruptCheckpoint(f"GGUF metadata of the wrong type: {error}") from error


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def _rope_from_hf(raw: Mapping[str, Any]) -> RopeConfig:
    # transformers 5 writes `rope_parameters` with rope_theta inside; before, `rope_scaling` beside it.
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    return RopeConfig(
        theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        kind=kind,
        factor=float(rope.get("factor", 1.0)),
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        original_max_position_embeddings=int(rope.get("original_max_position_embeddings", 8192)),
    )


def _rope_from_gguf(name: str, fields: Mapping[str, Any]) -> RopeConfig:
    kind = str(fields.get(f"{name}.rope.scaling.type", "none"))
    return RopeConfig(
        theta=float(fields.get(f"{name}.rope.freq_base", 10000.0)),
        kind="default" if kind == "none" else kind,
        factor=float(fields.get(f"{name}.rope.scaling.factor", 1.0)),
    )
