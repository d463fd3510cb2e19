"""Rotary position embedding as checkpoints describe it; `llama.py` computes with it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparserve.errors import CorruptCheckpoint, UnsupportedModel
from sparserve.model.fields import Fields


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding and its context extension.

    `kind` is "default", "linear" (positions divided by `factor`), "dynamic" (NTK-aware: theta grows
    with the position beyond the original context), "yarn" (arXiv 2309.00071) or "llama3" (Llama
    3.1's per-frequency scaling). The formulas are transformers' `modeling_rope_utils`.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position_embeddings: int = 8192  # dynamic, llama3, yarn
    beta_fast: float = 32.0  # yarn: rotations in the original context, above which nothing changes
    beta_slow: float = 1.0  # yarn: below which frequencies are divided
    attention_factor: float = 1.0  # yarn: q and k are both multiplied by it
    truncate: bool = True  # yarn: round the bounds of the ramp to whole pairs

    KINDS = ("default", "linear", "dynamic", "llama3", "yarn")

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise UnsupportedModel(
                f"RoPE type {reprlib.repr(self.kind)} is not supported; supported: {', '.join(self.KINDS)}"
            )
        for name in (
            "theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
        ):
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
        if self.kind == "yarn" and self.theta <= 1:
            raise CorruptCheckpoint(f"RoPE theta is {self.theta}; yarn needs more than 1")
        if self.kind in ("dynamic", "yarn") and self.factor < 1:
            raise CorruptCheckpoint(f"RoPE factor is {self.factor}; {self.kind} needs at least 1")

    def context(self, max_position_embeddings: int) -> int:
        """Positions that can be served. Files of the kinds that extend a context at run time often
        name the original one as their limit."""
        if self.kind not in ("dynamic", "yarn"):
            return max_position_embeddings
        extended = int(self.original_max_position_embeddings * min(self.factor, 2.0**31))
        return max(max_position_embeddings, min(extended, 2**31 - 1))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
        """From `config.json`. Raises UnsupportedModel or CorruptCheckpoint."""
        # transformers 5 writes `rope_parameters` with rope_theta inside; before, `rope_scaling` beside it.
        where = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
        rope = raw.get(where) or {}
        if not isinstance(rope, dict):
            raise CorruptCheckpoint(f"{where} is {reprlib.repr(rope)}, expected an object")
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        read = Fields(rope)
        theta = read.number("rope_theta", Fields(raw).number("rope_theta", 10000.0))
        # transformers' own default is the whole context
        original = read.integer("original_max_position_embeddings", max_position_embeddings)
        match kind:
            case "linear":
                return cls(theta, kind, read.number("factor"))
            case (
                "dynamic"
            ):  # transformers starts from max_position_embeddings, whatever `original` is
                return cls(
                    theta,
                    kind,
                    read.number("factor"),
                    original_max_position_embeddings=max_position_embeddings,
                )
            case "llama3":
                return cls(
                    theta,
                    kind,
                    read.number("factor"),
                    read.number("low_freq_factor"),
                    read.number("high_freq_factor"),
                    original,
                )
            case "yarn":
                factor = read.number("factor", max_position_embeddings / max(original, 1))
                return cls(
                    theta,
                    kind,
                    factor,
                    original_max_position_embeddings=original,
                    beta_fast=read.number("beta_fast", 32.0) or 32.0,
                    beta_slow=read.number("beta_slow", 1.0) or 1.0,
                    attention_factor=_attention_factor(read, factor),
                    truncate=read.boolean("truncate", True),
                )
        return cls(theta, kind)

    def to_hf(self) -> dict[str, Any]:
        """`rope_parameters` of `config.json`."""
        named: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind != "default":
            named["factor"] = self.factor
        keys: tuple[str, ...] = ()
        if self.kind == "llama3":
            keys = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if self.kind == "yarn":
            keys = (
                "beta_fast", "beta_slow", "attention_factor", "truncate",
                "original_max_position_embeddings",
            )  # fmt: skip
        return named | {key: getattr(self, key) for key in keys}

    @classmethod
    def from_gguf(
        cls, name: str, fields: Mapping[str, Any], max_position_embeddings: int
    ) -> RopeConfig:
        """From the metadata of an architecture `name`. Raises UnsupportedModel or CorruptCheckpoint."""
        kind = str(fields.get(f"{name}.rope.scaling.type", "none"))
        read, scaling = Fields(fields), f"{name}.rope.scaling"
        theta = read.number(f"{name}.rope.freq_base", 10000.0)
        if kind == "none":  # whatever factor stands beside it
            return cls(theta)
        factor = read.number(f"{scaling}.factor", 1.0)
        if kind != "yarn":
            return cls(theta, kind, factor)
        extrapolated = read.number(f"{scaling}.yarn_ext_factor", 1.0)
        if extrapolated != 1:
            raise UnsupportedModel(
                f"{scaling}.yarn_ext_factor {extrapolated} is not supported; only 1"
            )
        # llama.cpp multiplies the paper's temperature by the file's own factor.
        own = read.number(f"{scaling}.yarn_attn_factor", read.number(f"{scaling}.attn_factor", 1.0))
        return cls(
            theta,
            kind,
            factor,
            original_max_position_embeddings=read.integer(
                f"{scaling}.original_context_length", max_position_embeddings
            ),
            beta_fast=read.number(f"{scaling}.yarn_beta_fast", 32.0),
            beta_slow=read.number(f"{scaling}.yarn_beta_slow", 1.0),
            attention_factor=own * _mscale(factor),
        )


def _attention_factor(read: Fields, factor: float) -> float:
    """transformers `_compute_yarn_parameters`."""
    if "attention_factor" in read:
        return read.number("attention_factor")
    mscale, mscale_all_dim = read.number("mscale", 0.0), read.number("mscale_all_dim", 0.0)
    if mscale and mscale_all_dim:
        return _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    return _mscale(factor)


def _mscale(factor: float, multiplier: float = 1.0) -> float:
    """arXiv 2309.00071, equation 22: the square root of the inverse temperature."""
    return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0
