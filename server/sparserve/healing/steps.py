"""A recipe of several steps: prune, heal, round and compensate, calibrate, one folder after another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sparse_kernels.formats import DecoderFormats
from sparserve.calibration.pipeline import calibrate
from sparserve.calibration.plan import QUICK, CalibrationPlan, Effort
from sparserve.compression.recipe import Recipe, pruning_alone, without
from sparserve.compression.sections import HealStep
from sparserve.config import EngineSettings
from sparserve.engine.factory import load_by_settings
from sparserve.errors import ConfigError
from sparserve.healing.pipeline import HealedFolder, heal
from sparserve.healing.training import OnProgress
from sparserve.model.compress_folder import CompressedFolder, compress_folder, require_text
from sparserve.model.compressed_writer import alone_with, refuse_existing
from sparserve.model.identity import hash_of_files
from sparserve.model.loader import find_model, open_checkpoint
from sparserve.model.text import hashes_of

KEY = "steps.json"  # in the folder of what is between steps: of what it is

# (what is done, done, in all)
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Followed:
    """What was made; None of steps that the recipe lacks, and of those that an earlier run had finished."""

    pruned: CompressedFolder | None
    healed: HealedFolder | None
    rounded: CompressedFolder | None
    index: Path | None


def index_of(out: Path) -> Path:
    """Where the index of the folder `out` is written."""
    return out.with_name(f"{out.name}.index.safetensors")


def follow(
    model: str,
    recipe: Recipe,
    texts: Sequence[Path],
    out: Path,
    settings: EngineSettings,
    *,
    on_step: OnStep = lambda what, done, total: None,
    on_healing: OnProgress = lambda progress: None,
) -> Followed:
    """Write `model` as the folder `out` by all steps of `recipe`, and the index beside it.

    Folders between steps are in `out`.steps until all is done: a run that was interrupted goes on with the first step
    that is not finished. Raises as `compress_folder`, `heal` and `calibrate`.
    """
    run = _Run(recipe, texts, out, settings, on_step, on_healing)
    return run.follow(model)


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        texts: Sequence[Path],
        out: Path,
        settings: EngineSettings,
        on_step: OnStep,
        on_healing: OnProgress,
    ) -> None:
        self._recipe, self._texts, self._out = recipe, texts, out
        self._settings, self._on_step, self._on_healing = settings, on_step, on_healing
        self._between = out.with_name(f"{out.name}.steps")

    def follow(self, model: str) -> Followed:
        self._check()
        with alone_with(self._between):
            return self._follow(model)

    def _follow(self, model: str) -> Followed:
        recipe, out, pruned, healed, rounded = self._recipe, self._out, None, None, None
        goes_on = self._begin(model)
        if not (goes_on and out.exists()):  # else only the index is missing
            rest = without(recipe, "heal", "calibrate") if _leaves(recipe) else None
            if (step := recipe.heal) is None:
                assert rest is not None
                rounded = self._compress(model, rest, out)
            elif step.after_rounding:
                assert rest is not None
                rounded = self._compress(model, rest, self._folder("rounded"))
                healed = self._heal(str(self._folder("rounded")), step, out)
            else:
                if recipe.prune is not None:
                    alone = pruning_alone(recipe)
                    pruned = self._compress(model, alone, self._folder("pruned"))
                    model = str(self._folder("pruned"))
                if not recipe.rounds:
                    healed = self._heal(model, step, out)
                else:
                    healed = self._heal(model, step, self._folder("healed"))
                    rest = without(recipe, "prune", "heal", "calibrate")
                    rounded = self._compress(str(self._folder("healed")), rest, out)
        index = self._calibrate() if recipe.calibrate is not None else None
        self._clear()
        with suppress(OSError):
            (self._between / KEY).unlink()
            self._between.rmdir()
        return Followed(pruned, healed, rounded, index)

    def _check(self) -> None:
        """Raises ConfigError of what would stop a run after hours."""
        recipe = self._recipe
        require_text(recipe, self._texts)
        if recipe.calibrate is not None and not self._texts:
            raise ConfigError(
                f"the recipe {recipe.name} calibrates, which needs a text: give --text"
            )
        if recipe.heal is not None and recipe.heal.after_rounding and not _leaves(recipe):
            raise ConfigError(
                f"heal.after_rounding is true, and the recipe {recipe.name} rounds and prunes nothing"
            )

    def _begin(self, model: str) -> bool:
        """-> whether an earlier run of the same recipe, model and texts goes on; what another left is forgotten.

        Raises ConfigError of folders that no run left.
        """
        path = find_model(model, self._on_step)[1]
        open_checkpoint(path)  # what is no model is told as such
        key = self._between / KEY
        try:
            content = {
                "recipe": self._recipe.model_dump(mode="json"),
                "texts": hashes_of(self._texts),
                "model": hash_of_files(path),
            }
            told = json.dumps(content, sort_keys=True)
            known = key.read_text() if key.is_file() else None
            if known is None and self._between.exists() and any(self._between.iterdir()):
                raise ConfigError(
                    f"{self._between} is there, and is not of an unfinished recipe; remove it, or take another --out"
                )
            if known != told:
                refuse_existing(self._out)
                self._clear()
            self._between.mkdir(parents=True, exist_ok=True)
            key.write_text(told)
        except OSError as error:
            raise ConfigError(f"{self._between} cannot be written: {error}") from error
        return known == told

    def _clear(self) -> None:
        """All but the key, which says whose it is."""
        for path in self._between.glob("*"):
            if path.name != KEY:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _folder(self, name: str) -> Path:
        return self._between / name

    def _compress(self, model: str, recipe: Recipe, out: Path) -> CompressedFolder | None:
        if out.exists():  # an earlier run finished it
            return None
        return compress_folder(
            model,
            recipe,
            self._texts,
            out,
            on_layer=lambda done, total: self._on_step("compressing layers", done, total),
            on_choice=lambda done, total: self._on_step("choosing formats", done, total),
            on_prune=lambda done, total: self._on_step("pruning layers", done, total),
            on_download=self._on_step,
        )

    def _heal(self, model: str, step: HealStep, out: Path) -> HealedFolder | None:
        if out.exists():
            return None
        return heal(
            model,
            step,
            self._texts,
            out,
            self._settings,
            formats=_formats_of(self._recipe),
            on_stage=self._on_step,
            on_step=self._on_healing,
        )

    def _calibrate(self) -> Path:
        how, path = self._recipe.calibrate, index_of(self._out)
        assert how is not None
        settings = self._settings.model_copy(update={"model": str(self._out)})
        effort = QUICK if how.quick else Effort()
        plan = CalibrationPlan(
            self._texts, path, how.windows, how.prompt_tokens, how.decode_tokens, effort
        )
        calibrate(load_by_settings(settings), settings, plan, self._on_step)
        return path


def _formats_of(recipe: Recipe) -> DecoderFormats:
    """That it rounds to; of a `mixed` one with those of its first choice, whose planes all have."""
    if recipe.mixed is None:
        return recipe.formats()
    first = recipe.choices[0].format()
    return DecoderFormats(first, first, first, recipe.lm_head.format())


def _leaves(recipe: Recipe) -> bool:
    """Anything but healing and calibrating."""
    return recipe.rounds or recipe.prune is not None
