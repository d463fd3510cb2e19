"""What a decoder looks like, in our names, whatever file it came from.

Foreign names are translated here once; `FAMILIES` is the list of architectures that can be run.
"""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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
                f"RoPE type {reprlib.repr(self.kind)} is not supported; supported: {', '.join(self.KINDS)}"
            )
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise CorruptCheckpoint(f"RoPE {name} is {value}; it must be finite and > 0")
        if not 0 < self.original_max_position_embeddings < 2**31:
            raise CorruptCheckpoint(
                f"RoPE original_max_position_embeddings is "
                f"{reprlib.repr(self.original_max_position_embeddings)}; it must be in [1, 2^31)"
            )
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
                raise CorruptCheckpoint(f"{name} is {reprlib.repr(value)}; it must be in [1, 2^31)")
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
                    f"special token id {reprlib.repr(token)} is outside the vocabulary of {self.vocab_size}"
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
        for biased in ("attention_bias", "mlp_bias"):
            if raw.get(biased):
                raise UnsupportedModel(f"{biased}=true is not supported yet")
        fields = _Fields(raw)
        heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
        max_position_embeddings = fields.integer("max_position_embeddings", 2048)
        eos = _Fields(generation if "eos_token_id" in generation else raw).ids("eos_token_id")
        return cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=fields.integer("num_key_value_heads", heads),
            head_dim=fields.integer("head_dim", hidden // max(heads, 1)),
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=_rope_from_hf(raw, max_position_embeddings),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            eos_token_ids=eos,
            bos_token_id=next(iter(fields.ids("bos_token_id")), None),
        )

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], tie_word_embeddings: bool) -> ModelConfig:
        """From GGUF metadata. Raises UnsupportedModel or CorruptCheckpoint."""
        name = str(fields.get("general.architecture"))
        architecture = next((hf for hf, gguf in FAMILIES.items() if gguf == name), None)
        if architecture is None:
            raise UnsupportedModel(
                f"GGUF architecture {reprlib.repr(name)} is not supported; "
                f"supported: {', '.join(FAMILIES.values())}"
            )
        read = _Fields(fields)
        heads, hidden = (
            read.integer(f"{name}.attention.head_count"),
            read.integer(f"{name}.embedding_length"),
        )
        head_dim = read.integer(f"{name}.attention.key_length", hidden // max(heads, 1))
        config = cls(
            architecture=architecture,
            vocab_size=len(read.array("tokenizer.ggml.tokens")),
            hidden_size=hidden,
            intermediate_size=read.integer(f"{name}.feed_forward_length"),
            num_layers=read.integer(f"{name}.block_count"),
            num_heads=heads,
            num_kv_heads=read.integer(f"{name}.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=read.integer(f"{name}.context_length"),
            rms_norm_eps=read.number(f"{name}.attention.layer_norm_rms_epsilon"),
            rope=_rope_from_gguf(name, fields),
            tie_word_embeddings=tie_word_embeddings,
            eos_token_ids=read.ids("tokenizer.ggml.eos_token_id"),
            bos_token_id=next(iter(read.ids("tokenizer.ggml.bos_token_id")), None),
        )
        rotated = read.integer(f"{name}.rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise UnsupportedModel(
                f"{name}.rope.dimension_count is {rotated}; only whole heads of {head_dim} are rotated"
            )
        return config


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put `path` in front of what is found wrong with its contents."""
    try:
        yield
    except (CorruptCheckpoint, UnsupportedModel) as error:
        raise type(error)(f"{path}: {error}") from error


class _Fields:
    """Metadata from outside, read one value at a time. null counts as absent.

    Raises CorruptCheckpoint, which names the key and the value.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        whole = value.is_integer() if isinstance(value, float) else isinstance(value, int)
        if not whole or isinstance(value, bool):
            raise self._wrong(key, "an integer")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        if not abs(value) <= sys.float_info.max:  # also NaN, and integers that no float holds
            raise self._wrong(key, "a finite number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def array(self, key: str) -> list[Any]:
        value = self._value(key, None)
        if not isinstance(value, list):
            raise self._wrong(key, "an array")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """One token id, several or none."""
        value = self._raw.get(key)
        several = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in several):
            raise self._wrong(key, "a token id or a list of them")
        return tuple(several)

    def _value(self, key: str, default: Any) -> Any:
        value = self._raw.get(key)
        value = default if value is None else value
        if value is None:
            raise CorruptCheckpoint(f"{key} is missing")
        return value

    def _wrong(self, key: str, expected: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{key} is {reprlib.repr(self._raw[key])}, expected {expected}")


def _rope_from_hf(raw: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    # transformers 5 writes `rope_parameters` with rope_theta inside; before, `rope_scaling` beside it.
    where = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = raw.get(where) or {}
    if not isinstance(rope, dict):
        raise CorruptCheckpoint(f"{where} is {reprlib.repr(rope)}, expected an object")
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    read, top = _Fields(rope), _Fields(raw)
    theta = read.number("rope_theta", top.number("rope_theta", 10000.0))
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            kind=kind,
            factor=read.number("factor"),
            low_freq_factor=read.number("low_freq_factor"),
            high_freq_factor=read.number("high_freq_factor"),
            # transformers' own default is the whole context
            original_max_position_embeddings=read.integer(
                "original_max_position_embeddings", max_position_embeddings
            ),
        )
    return RopeConfig(theta, kind, factor=read.number("factor") if kind == "linear" else 1.0)


def _rope_from_gguf(name: str, fields: Mapping[str, Any]) -> RopeConfig:
    kind = str(fields.get(f"{name}.rope.scaling.type", "none"))
    read = _Fields(fields)
    return RopeConfig(
        theta=read.number(f"{name}.rope.freq_base", 10000.0),
        kind="default" if kind == "none" else kind,
        factor=read.number(f"{name}.rope.scaling.factor", 1.0),
    )
