"""Recipes: how the matrices of a model are compressed, as YAML files.

    name: mine
    attention: {bits: 4, group_size: 32}
    overrides:
      - {layers: 0-1, down: {bits: 8}}
      - {layers: [0, 29], attention: {bits: 8}, gate_up: {bits: 8}}

Or formats that are chosen by part and layer:

    name: chosen
    mixed: {target_bits: 4.95, choices: [{bits: 4}, {bits: 4, group_size: 32}, {bits: 8}]}
"""

from __future__ import annotations

import reprlib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from sparse_kernels import _abi
from sparse_kernels.formats import DecoderFormats, LayerFormats, MatrixFormat
from sparserve.errors import ConfigError

SHIPPED = ("quality", "balanced", "fast")
PARTS = ("attention", "gate_up", "down")  # of a layer
MOST_LAYERS = _abi.SK_MAX_LAYERS
MOST_PROBLEMS = 10  # that are told of a recipe


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
    criterion: Literal["amp", "amp_w", "wanda", "flap", "magnitude", "random"] = "amp_w"
    # The same share of each layer, or more of layers whose units differ less.
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


class CalibrationSize(BaseModel):
    """Of the text that inputs are measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    windows: Annotated[int, Field(ge=1, le=65536)] = 32
    tokens: Annotated[int, Field(ge=2, le=65536)] = 512  # of a window


class Recipe(BaseModel):
    """Which quantizer rounds, what makes up for it, and in which format each kind of matrix is stored."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    quantizer: Literal["rtn", "gptq"] = "gptq"
    act_order: bool = True  # GPTQ rounds the largest inputs first
    # What GPTQ brings a matrix near to: its weights, or the outputs that it has in the original model, where
    # nothing before it is compressed; then it also makes up for what went wrong before.
    target: Literal["weights", "outputs"] = "weights"
    # Columns are scaled before they are rounded, and what makes the inputs takes the scales back.
    scale_columns: bool = True
    # Levels of matrices of 4 bits as of so many bits, to study what fewer would lose.
    value_bits: Literal[2, 3, None] = None
    # Low-rank terms: by the weights' error alone, by correlated inputs, or by uncorrelated ones.
    compensate: Literal["none", "lorc", "qera", "qera-diagonal"] = "none"
    attention: Part = Part()
    gate_up: Part = Part()
    down: Part = Part()
    lm_head: Part = Part(bits=8)  # always rounded to nearest
    activation_bits: Literal[8, 16] = 16
    # Of some layers; later ones win.
    overrides: Annotated[tuple[Override, ...], Field(strict=False)] = ()
    # Instead of attention, gate_up, down and overrides, which `model.mixed.allocate` fills in.
    mixed: Mixed | None = None
    prune: Prune | None = None
    calibration: CalibrationSize = CalibrationSize()

    @property
    def needs_text(self) -> bool:
        by_inputs = self.quantizer == "gptq" or self.compensate.startswith("qera")
        return by_inputs or self.mixed is not None or self.prune is not None

    @property
    def choices(self) -> tuple[Part, ...]:
        """Of `mixed`."""
        assert self.mixed is not None
        with_ranks = CHOICES if self.compensate == "none" else (*CHOICES, RANKED_CHOICE)
        return with_ranks if self.mixed.choices is None else self.mixed.choices

    def formats_of(self, part: str) -> list[MatrixFormat]:
        """All that matrices of this part of a layer may have."""
        if self.mixed is not None:
            return [own.format() for own in self.choices]
        return [own.format() for name, own in self._all_parts().items() if name.endswith(part)]

    def formats(self) -> DecoderFormats:
        """Raises ValueError of a recipe whose `mixed` is not filled in."""
        if self.mixed is not None:
            raise ValueError(
                f"the recipe {self.name} is mixed; it has formats once it is allocated"
            )
        usual = self._layer_formats({})
        changed: dict[int, dict[str, Part]] = {}
        for own in self.overrides:
            for index in own.layers:
                changed.setdefault(index, {}).update(own.parts)
        layers = ((index, self._layer_formats(changed[index])) for index in sorted(changed))
        return DecoderFormats(
            *usual.matrices,
            lm_head=self.lm_head.format(),
            activation_bits=self.activation_bits,
            overrides=tuple((index, own) for index, own in layers if own != usual),
        )

    def _layer_formats(self, changed: dict[str, Part]) -> LayerFormats:
        parts: dict[str, Part] = {name: getattr(self, name) for name in PARTS} | changed
        return LayerFormats(**{name: part.format() for name, part in parts.items()})

    def _all_parts(self) -> dict[str, Part]:
        """By name, of layers of their own too."""
        if self.mixed is not None:
            return {f"mixed.choices.{index}": part for index, part in enumerate(self.choices)}
        parts = {name: getattr(self, name) for name in PARTS}
        for index, own in enumerate(self.overrides):
            parts |= {f"overrides.{index}.{name}": part for name, part in own.parts.items()}
        return parts

    @model_validator(mode="after")
    def _must_agree(self) -> Self:
        if self.mixed is None:
            self.formats()
        else:
            self._refuse_what_is_mixed()
        parts = self._all_parts()
        ranks = {name: part.rank for name, part in parts.items()}
        if self.prune is None and all(own.bits == 16 for own in (*parts.values(), self.lm_head)):
            raise ValueError("all matrices have 16 bits, so nothing is compressed; give one 4 or 8")
        if self.compensate == "none" and any(ranks.values()):
            name = next(name for name, rank in ranks.items() if rank)
            raise ValueError(
                f"{name} has rank {ranks[name]} and compensate is none; take rank 0, or qera or lorc"
            )
        if self.compensate != "none" and not any(ranks.values()):
            raise ValueError(
                f"compensate is {self.compensate} and all ranks are 0; give a matrix a rank, or take none"
            )
        if self.quantizer == "rtn" and "act_order" in self.model_fields_set and self.act_order:
            raise ValueError("act_order is true, which only quantizer gptq has an order for")
        if self.quantizer == "rtn" and self.target == "outputs":
            raise ValueError("target is outputs, which quantizer rtn cannot follow; take gptq")
        if self.value_bits is not None and not any(own.bits == 4 for own in parts.values()):
            raise ValueError(
                f"value_bits is {self.value_bits}, and no matrix of a layer has 4 bits"
            )
        self._refuse_hidden()
        return self

    def _refuse_what_is_mixed(self) -> None:
        """Raises ValueError, and of an LM head that cannot be."""
        DecoderFormats(lm_head=self.lm_head.format())
        for name in (*PARTS, "overrides", "value_bits"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is given, and mixed chooses the formats; leave one out")

    def _refuse_hidden(self) -> None:
        """Raises ValueError of an override that later ones leave nothing of."""
        later: set[tuple[str, int]] = set()
        for index, own in reversed(list(enumerate(self.overrides))):
            changed = {(name, layer) for name in own.parts for layer in own.layers}
            if changed <= later:
                raise ValueError(f"overrides.{index} has no effect: later ones replace all of it")
            later |= changed


CHOICES = (Part(bits=4, group_size=64), Part(bits=4, group_size=32), Part(bits=8, group_size=64))
RANKED_CHOICE = Part(bits=4, group_size=32, rank=32)  # with low-rank terms

SECTIONS: dict[str, type[BaseModel]] = {
    "attention": Part,
    "gate_up": Part,
    "down": Part,
    "lm_head": Part,
    "overrides": Override,
    "mixed": Mixed,
    "prune": Prune,
    "choices": Part,
    "calibration": CalibrationSize,
}


def read_recipe(recipe: str) -> Recipe:
    """`recipe` is the name of one that is shipped, or the path of a YAML file. Raises ConfigError."""
    if recipe in SHIPPED:
        source = files("sparserve.compression") / "recipes" / f"{recipe}.yaml"
        return parse_recipe(source.read_text(encoding="utf-8"), recipe)
    path = Path(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no recipe {recipe!r}: expected {', '.join(SHIPPED)}, or the path of a YAML file"
        ) from error
    except (OSError, ValueError) as error:  # not UTF-8, or a zero byte in the path
        raise ConfigError(f"the recipe {recipe!r} cannot be read: {error}") from error
    return parse_recipe(text, recipe)


def pruning(
    recipe: Recipe,
    *,
    ratio: float | None = None,
    heads: float | None = None,
    mlp: float | None = None,
) -> Recipe:
    """`recipe` with these shares pruned, as its own `prune` says how; without any as it is. Raises ConfigError."""
    if ratio is None and heads is None and mlp is None:
        return recipe
    own = {} if recipe.prune is None else recipe.prune.model_dump()
    shares = {"ratio": ratio, "heads": heads or 0, "mlp": mlp or 0}
    content = recipe.model_dump(exclude_unset=True) | {"prune": own | shares}
    return _validated(content, f"{recipe.name} with --prune")


class _Loader(yaml.SafeLoader):
    """Refuses a name that is given twice, of which others take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in names:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is given twice", problem_mark=key.start_mark
                )
            names.add(key.value)
        return node


def parse_recipe(text: str, where: str) -> Recipe:
    """`where` names the recipe in errors. Raises ConfigError."""
    try:
        content = yaml.load(text, _Loader)
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: of a date or a number
        reason = " ".join(str(error).split())
        raise ConfigError(f"the recipe {where} is no YAML: {reason}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"the recipe {where} must be lines of `name: value`")
    return _validated(content, where)


def _validated(content: object, where: str) -> Recipe:
    """Raises ConfigError."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        found = error.errors()
        problems = [_explain(problem) for problem in found[:MOST_PROBLEMS]]
        if len(found) > MOST_PROBLEMS:
            problems.append(f"and {len(found) - MOST_PROBLEMS} more")
        told = "\n".join(problems)
        raise ConfigError(f"the recipe {where} cannot be followed:\n{told}") from error


def _explain(problem: ErrorDetails) -> str:
    name = ".".join(map(str, problem["loc"])) or "it"
    reason = problem["msg"].removeprefix("Value error, ")
    match problem["type"]:
        case "extra_forbidden":
            sections = [own for own in problem["loc"][:-1] if isinstance(own, str)]
            owner = SECTIONS[sections[-1]] if sections else Recipe
            return f"{name} is no setting; there are {', '.join(owner.model_fields)}"
        case "missing":
            return f"{name} is missing"
        case "value_error":
            return f"{name}: {reason}"
    # Of anchors a value can be endless.
    return f"{name} is {reprlib.repr(problem['input']):.200}: {reason}"
