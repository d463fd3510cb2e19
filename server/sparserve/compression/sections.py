"""The sections of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sparse_kernels import _abi
from sparse_kernels.formats import MatrixFormat
from sparserve.compression.healing import Heal

PARTS = ("attention", "gate_up", "down")  # of a layer
MOST_LAYERS = _abi.SK_MAX_LAYERS


class Part(BaseModel):
    """How matrices of one kind are stored; see `MatrixFormat`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bits: Literal[4, 8, 16] = 4  # 16: they stay in bfloat16, and the rest has no meaning
    group_size: int = 64
    low_bits: int = 0
    rank: int = 0

    def format(self) -> MatrixFormat:
        if self.bits == 16:
            return MatrixFormat(low_bits=self.low_bits, rank=self.rank)
        return MatrixFormat(self.bits, self.group_size, self.low_bits, self.rank)

    @model_validator(mode="after")
    def _must_be_a_format(self) -> Self:
        self.format()
        return self


def _layers(value: Any) -> Any:
    """ "2-5" and 3 as tuples; all else as it is."""
    if isinstance(value, str):
        first, dash, last = value.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise ValueError('expected a layer, a range like "2-5", or a list of layers')
        return tuple(range(int(first), min(int(last or first), MOST_LAYERS) + 1))
    return (
        (value,) if isinstance(value, int) else tuple(value) if isinstance(value, list) else value
    )


class Override(BaseModel):
    """What some layers have instead of what the recipe says of all; each part as a whole."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    layers: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=MOST_LAYERS)], ...], BeforeValidator(_layers)
    ]
    attention: Part | None = None
    gate_up: Part | None = None
    down: Part | None = None

    @property
    def parts(self) -> dict[str, Part]:
        parts = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in parts.items() if part is not None}

    @model_validator(mode="after")
    def _must_change_something(self) -> Self:
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError("layers must be one or more, each once")
        if not self.parts:
            raise ValueError(f"there is nothing that changes; give {', '.join(PARTS)}, or some")
        return self


class Mixed(BaseModel):
    """Formats that are chosen for each part of each layer, up to a size or down to a KL."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    target_bits: Annotated[float, Field(gt=0, le=16)] | None = None  # of a weight of the layers
    target_kl: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # predicted
    choices: Annotated[tuple[Part, ...], Field(strict=False, min_length=2)] | None = None

    @model_validator(mode="after")
    def _must_have_a_target_and_a_choice(self) -> Self:
        if (self.target_bits is None) == (self.target_kl is None):
            raise ValueError("give one of target_bits and target_kl")
        choices = self.choices or ()
        if len(set(choices)) < len(choices):
            raise ValueError("choices has one twice")
        if len({own.low_bits for own in choices}) > 1:
            raise ValueError("choices differ in low_bits, which must be the same in all layers")
        return self


class Prune(BaseModel):
    """Which heads and neurons are removed before anything is rounded. Either `ratio`, or `heads`, `mlp` or both."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None  # of all the model's parameters
    heads: Annotated[float, Field(ge=0, lt=1)] = 0  # of the parameters of attention
    mlp: Annotated[float, Field(ge=0, lt=1)] = 0  # of the feed-forward layers' parameters
    criterion: Literal["amp", "amp_w", "wanda", "flap", "magnitude", "random"] = "flap"
    # Of a `ratio`: heads only for what neurons cannot give, or both alike.
    kinds: Literal["neurons_first", "together"] = "neurons_first"
    # The same share of each layer, or more of layers whose units differ more.
    allocation: Literal["uniform", "adaptive"] = "uniform"
    # A KV head with all its query heads, or a query head of each, which leaves the KV cache as large as it is.
    head_unit: Literal["groups", "queries"] = "groups"
    # What is removed is replaced by its mean, as a bias; or the matrices after it are fitted again, with a bias.
    # Each matrix has of what is tried what helps most on held-out text.
    restore: Literal["none", "bias", "least_squares"] = "least_squares"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # of criterion random

    @model_validator(mode="after")
    def _must_remove_something(self) -> Self:
        if self.ratio is not None and (self.heads or self.mlp):
            raise ValueError("give ratio, or heads and mlp; not both")
        if self.ratio is None and not (self.heads or self.mlp):
            raise ValueError("nothing is removed; give ratio, heads or mlp")
        return self

    @property
    def needs_text(self) -> bool:
        return self.restore != "none" or self.criterion not in ("magnitude", "random")


class HealStep(Heal):
    """`sparserve heal` as a step of a recipe: of what is pruned, before or after it is rounded."""

    after_rounding: bool = False


class Calibrate(BaseModel):
    """The index that `sparserve calibrate` measures of what was made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    windows: Annotated[int, Field(ge=2, le=4096)] = 64
    prompt_tokens: Annotated[int, Field(ge=2, le=65536)] = 256
    decode_tokens: Annotated[int, Field(ge=1, le=65536)] = 64
    quick: bool = False


class CalibrationSize(BaseModel):
    """Of the text that inputs are measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    windows: Annotated[int, Field(ge=1, le=65536)] = 32
    tokens: Annotated[int, Field(ge=2, le=65536)] = 512  # of a window
