"""Recipes: how the matrices of a model are compressed, as YAML files.

    name: mine
    attention: {bits: 4, group_size: 32}
    overrides:
      - {layers: 0-1, down: {bits: 8}}
      - {layers: [0, 29], attention: {bits: 8}, gate_up: {bits: 8}}

Or formats that are chosen by part and layer:

    name: chosen
    mixed: {target_bits: 4.95, choices: [{bits: 4}, {bits: 4, group_size: 32}, {bits: 8}]}

Or several steps, one after another:

    name: steps
    prune: {ratio: 0.2}
    heal: {through: "core:0.5", tokens: 1_000_000}
    compensate: qera
    attention: {bits: 4, rank: 32}
    calibrate: {windows: 64}
"""

from __future__ import annotations

import reprlib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from sparse_kernels.formats import DecoderFormats, LayerFormats, MatrixFormat
from sparserve.compression.sections import (
    PARTS,
    Calibrate,
    CalibrationSize,
    HealStep,
    Mixed,
    Override,
    Part,
    Prune,
)
from sparserve.errors import ConfigError

SHIPPED = ("quality", "balanced", "fast")
# A name that stands for no rounding at all: of what is pruned.
NONE = "none"
MOST_PROBLEMS = 10  # that are told of a recipe


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
    heal: HealStep | None = None
    calibrate: Calibrate | None = None
    calibration: CalibrationSize = CalibrationSize()

    @property
    def needs_text(self) -> bool:
        by_inputs = self.quantizer == "gptq" or self.compensate.startswith("qera")
        by_pruning = self.prune is not None and self.prune.needs_text
        return (by_inputs and self.rounds) or self.mixed is not None or by_pruning

    @property
    def reads_text(self) -> bool:
        """Whether a text makes a difference."""
        return self.needs_text or not self.is_one_step

    @property
    def rounds(self) -> bool:
        """Whether any matrix gets integers."""
        if self.mixed is not None:
            return True
        return any(own.bits != 16 for own in (*self._all_parts().values(), self.lm_head))

    @property
    def is_one_step(self) -> bool:
        """Whether `compress_folder` can follow it alone."""
        return self.heal is None and self.calibrate is None

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
        if self.prune is None and self.heal is None and not self.rounds:
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

ALL_16 = {name: {"bits": 16} for name in (*PARTS, "lm_head")}

SECTIONS: dict[str, type[BaseModel]] = {
    "attention": Part,
    "gate_up": Part,
    "down": Part,
    "lm_head": Part,
    "overrides": Override,
    "mixed": Mixed,
    "prune": Prune,
    "heal": HealStep,
    "calibrate": Calibrate,
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
            f"there is no recipe {recipe!r}: expected {', '.join(SHIPPED)}, {NONE} with --prune, or the path of a YAML file"
        ) from error
    except (OSError, ValueError) as error:  # not UTF-8, or a zero byte in the path
        raise ConfigError(f"the recipe {recipe!r} cannot be read: {error}") from error
    return parse_recipe(text, recipe)


def read_pruning(
    recipe: str,
    *,
    ratio: float | None = None,
    heads: float | None = None,
    mlp: float | None = None,
) -> Recipe:
    """As `read_recipe`, NONE too, with these shares pruned, as its own `prune` says how; without any as it is. Raises
    ConfigError."""
    prunes = not (ratio is None and heads is None and mlp is None)
    if recipe == NONE and not prunes:
        raise ConfigError(
            "the recipe none rounds nothing, and nothing is pruned: give --prune, or another recipe"
        )
    content: dict[str, Any] = {"name": NONE, **ALL_16}
    if recipe != NONE:
        content = _given(read_recipe(recipe))
    if prunes:
        own = content.get("prune") or {}
        shares = {"ratio": ratio, "heads": heads or 0, "mlp": mlp or 0}
        content |= {"prune": own | shares}
    return _validated(content, f"{recipe} with --prune" if prunes else recipe)


def without(recipe: Recipe, *steps: str) -> Recipe:
    """`recipe` with these sections left out. Raises ConfigError where nothing is left."""
    content = {name: own for name, own in _given(recipe).items() if name not in steps}
    return _validated(content, recipe.name)


def pruning_alone(recipe: Recipe) -> Recipe:
    """What `recipe` prunes, and nothing rounded."""
    kept = {name: own for name, own in _given(recipe).items() if name in ("prune", "calibration")}
    return _validated({"name": recipe.name, **ALL_16, **kept}, recipe.name)


def _given(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(exclude_unset=True)


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
    for name in ("mixed", "prune", "heal", "calibrate"):  # null, which is their default, too
        if name in content and content[name] is None:
            raise ConfigError(
                f"the recipe {where} cannot be followed:\n{name} is empty; give settings, {{}} for the defaults, or leave "
                "it out"
            )
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
