"""What pruning costs: all ways of a grid on one calibration text, scored alike on another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any, get_args

import torch

from sparserve.bench.evaluation import Load, evaluate_formats
from sparserve.bench.evaluation import Plan as Scoring
from sparserve.bench.quality import Quality
from sparserve.bench.rounds import BenchProgress
from sparserve.compression.sections import Prune
from sparserve.config import EngineSettings
from sparserve.errors import ConfigError
from sparserve.model.loader import LoadedModel
from sparserve.model.pruning import Pruned, prune, statistics_of
from sparserve.model.pruning_shares import check_shares

PRUNED = "pruned"  # what the model is called while it is scored
DTYPE = "bfloat16"
# What --what names -> the field of Prune that says how much; two are kinds of a ratio.
SHARES = {"neurons_first": "ratio", "together": "ratio", "heads": "heads", "mlp": "mlp"}


@dataclass(frozen=True, slots=True)
class Plan:
    scoring: Scoring
    shares: Sequence[float]
    what: Sequence[str]  # of SHARES
    criteria: Sequence[str]
    allocations: Sequence[str]
    restores: Sequence[str]
    head_unit: str

    def ways(self) -> list[Prune]:
        """Raises ConfigError of values that `Prune` has not."""
        return list(self._ways())

    def _ways(self) -> Iterator[Prune]:
        for name, known in {
            "what": tuple(SHARES), "criteria": choices_of("criterion"), "allocations": choices_of("allocation"),
            "restores": choices_of("restore"), "head_unit": choices_of("head_unit"),
        }.items():  # fmt: skip
            given = getattr(self, name)
            words = [given] if isinstance(given, str) else given
            if unknown := [own for own in words if own not in known]:
                flag = name.replace("_", "-")
                raise ConfigError(
                    f"--{flag} has {', '.join(unknown)}; there are: {', '.join(known)}"
                )
        grid = product(self.what, self.shares, self.criteria, self.allocations, self.restores)
        for what, share, criterion, allocation, restore in grid:
            if not 0 < share < 1:
                raise ConfigError(f"--shares has {share:g}; give shares between 0 and 1")
            yield Prune.model_validate(
                {
                    SHARES[what]: share,
                    "kinds": what if SHARES[what] == "ratio" else "neurons_first",
                    "criterion": criterion,
                    "allocation": allocation,
                    "restore": restore,
                    "head_unit": self.head_unit,
                }
            )


def choices_of(field: str) -> tuple[str, ...]:
    """Of Prune."""
    return get_args(Prune.model_fields[field].annotation)


@dataclass(frozen=True, slots=True)
class Row:
    """One way of pruning."""

    how: Prune
    what: str  # of SHARES
    removed: float  # share of all parameters that are gone
    # Squared error of the restored matrices on held-out text, means over them; None where none was.
    error: float | None
    restored: float | None
    quality: Quality

    @property
    def share(self) -> float:
        """That was asked for."""
        asked: float = getattr(self.how, SHARES[self.what])
        return asked

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"how": self.how.model_dump(mode="json", exclude_none=True)}


@dataclass(frozen=True, slots=True)
class Report:
    version: str
    command: str
    model: str
    text: str  # the files' names
    calibrated_on: Sequence[str]
    calibration_tokens: int
    windows: int
    prompt_tokens: int  # of a window
    decode_tokens: int  # that are scored
    rows: list[Row] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"rows": [row.as_json() for row in self.rows]}


def measure_pruning(
    settings: EngineSettings,
    plan: Plan,
    model: LoadedModel,
    token_ids: torch.Tensor,
    load: Load,
    on_progress: BenchProgress,
) -> Iterator[Row]:
    """`model` in bfloat16; token_ids [windows, tokens] of the calibration. Raises ConfigError."""
    ways = plan.ways()
    alike = (own.model_copy(update={"criterion": "random", "restore": "none"}) for own in ways)
    for how in dict.fromkeys(alike):  # told now, not hours into the grid
        check_shares(model.config, how, f"--shares with --what {_what(how)}")
    seen = statistics_of(
        model,
        token_ids,
        lambda done: on_progress("reading the calibration", done, model.config.num_layers),
    )
    for number, how in enumerate(ways):
        on_progress("ways of pruning", number, len(ways))
        pruned = prune(model, how, token_ids, seen=seen)

        def load_this(name: str, dtype: str, made: LoadedModel = pruned.model) -> LoadedModel:
            return made if name == PRUNED else load(name, dtype)

        own = settings.model_copy(update={"model": PRUNED})
        scoring = replace(plan.scoring, original=settings.model)
        (quality,) = evaluate_formats(own, scoring, load_this, lambda *_: None)
        yield _row(how, pruned, model, quality)
    on_progress("ways of pruning", len(ways), len(ways))


def _row(how: Prune, pruned: Pruned, model: LoadedModel, quality: Quality) -> Row:
    found = [own for layer in pruned.layers for own in (layer.output, layer.down) if own]
    errors = restored = None
    if found:
        errors = sum(own.removed for own in found) / len(found)
        restored = sum(own.restored for own in found) / len(found)
    removed = pruned.parameters / model.config.num_parameters
    return Row(how, _what(how), removed, errors, restored, quality)


def _what(how: Prune) -> str:
    return how.kinds if how.ratio is not None else "heads" if how.heads else "mlp"
