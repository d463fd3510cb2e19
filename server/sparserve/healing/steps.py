"""A recipe of several steps: prune, heal, round and compensate, calibrate, one folder after another."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sparse_kernels.formats import DecoderFormats
from sparserve.calibration.pipeline import calibrate, partial_of
from sparserve.calibration.plan import QUICK, CalibrationPlan, Effort
from sparserve.calibration.stages import METADATA_KEY as STAGES
from sparserve.calibration.text import read_text
from sparserve.compression.recipe import Recipe, pruning_alone, without
from sparserve.compression.sections import HealStep
from sparserve.config import EngineSettings
from sparserve.engine.factory import load_by_settings
from sparserve.errors import ConfigError
from sparserve.healing.pipeline import HealedFolder, heal, refuse_foreign_files
from sparserve.healing.policies import parse_through
from sparserve.healing.text import read_given
from sparserve.healing.training import OnProgress
from sparserve.model.compress_folder import CompressedFolder, compress_folder, require_text
from sparserve.model.compressed_checkpoint import INFO
from sparserve.model.compressed_writer import alone_with, check_source, refuse_existing
from sparserve.model.compressing import check_recipe
from sparserve.model.identity import hash_of_files, hash_of_tokenizer
from sparserve.model.loader import LoadedModel, load_model
from sparserve.model.text import hashes_of, read_windows
from sparserve.sparsity.index import METADATA_KEY as INDEX
from sparserve.sparsity.index import refuse_foreign

KEY = "steps.json"  # in the folder of what is between steps: of what each is
OUT = "out"  # in there: the hash of what the folder that was made says of itself

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
        loaded = load_model(model, dtype="bfloat16", layers_at_use=True, on_download=self._on_step)
        self._check_fit(loaded)
        with alone_with(self._between):
            with alone_with(self._out):  # which the last step will want
                pass
            return self._follow(model, loaded)

    def _follow(self, model: str, loaded: LoadedModel) -> Followed:
        steps = _steps_of(self._recipe)
        compressed: dict[str, CompressedFolder] = {}
        healed = None
        if not self._begin(loaded, steps):
            for name, step in steps.items():
                out = self._out if name == list(steps)[-1] else self._between / name
                if out == self._out or not out.exists():  # else an earlier run finished it
                    if isinstance(step, HealStep):
                        healed = self._heal(model, step, out)
                    else:
                        compressed[name] = self._compress(model, step, out)
                model = str(out)
            self._note(self._known() | {OUT: _info_hash(self._out)})
        index = self._calibrate() if self._recipe.calibrate is not None else None
        self._remove_all_but({KEY})
        with suppress(OSError):
            (self._between / KEY).unlink()
            self._between.rmdir()
        return Followed(compressed.get("pruned"), healed, compressed.get("rounded"), index)

    def _check(self) -> None:
        """Raises ConfigError of what would stop a run after hours, or write over what it did not make."""
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
        *_, last = _steps_of(recipe).values()
        if isinstance(last, HealStep):
            refuse_foreign_files(self._out)
        if recipe.calibrate is not None:
            index = index_of(self._out)
            refuse_foreign(index, INDEX, "take another --out")
            refuse_foreign(partial_of(index), STAGES, "take another --out")

    def _check_fit(self, model: LoadedModel) -> None:
        """The same of what depends on `model`. Raises ModelError too."""
        recipe, texts = self._recipe, self._texts
        if _leaves(recipe):
            check_source(model)
            check_recipe(model.config, recipe)
        if recipe.needs_text:
            size = recipe.calibration
            read_windows(model, texts, size.windows, size.tokens)
        if (step := recipe.heal) is not None:
            parse_through(step.through, model, _formats_of(recipe))
            read_given(model, step, texts)
        if (how := recipe.calibrate) is not None:
            sizes = how.windows, how.prompt_tokens, how.decode_tokens
            names = [f"calibrate.{name}" for name in ("windows", "prompt_tokens", "decode_tokens")]
            read_text(model, texts, *sizes, names)

    def _begin(self, model: LoadedModel, steps: Mapping[str, Recipe | HealStep]) -> bool:
        """-> whether an earlier run finished `out`. Of what one left, a step that is no longer the same, and all after
        it, are forgotten.

        Raises ConfigError of folders that no run left.
        """
        try:
            there = self._between.exists() and any(self._between.iterdir())
            if there and not (self._between / KEY).is_file():
                raise ConfigError(
                    f"{self._between} is there, and is not of an unfinished recipe; remove it, or take another --out"
                )
            keys, known = self._keys(model, steps), self._known()
            same = {name for name, own in keys.items() if known.get(name) == own}
            finished = same == keys.keys() and known.get(OUT, "") == _info_hash(self._out) != ""
            if not finished:
                refuse_existing(self._out)
            # Files of unfinished steps are beside their folders, as healed.state is.
            parts = {path.name for path in self._between.glob("*") if path.stem in same}
            self._remove_all_but({KEY, *parts})
            self._between.mkdir(parents=True, exist_ok=True)
            self._note(keys | ({OUT: known[OUT]} if finished else {}))
        except OSError as error:
            raise ConfigError(f"{self._between} cannot be written: {error}") from error
        return finished

    def _keys(self, model: LoadedModel, steps: Mapping[str, Recipe | HealStep]) -> dict[str, str]:
        """Of each step, of all that it and those before it depend on."""
        files = hash_of_files(model.path), hash_of_tokenizer(model)
        told: object = [files, hashes_of(self._texts)]
        keys = {}
        for name, step in steps.items():
            told = [told, step.model_dump(mode="json")]
            if isinstance(step, HealStep) and "token" in step.through:
                told = [told, str(_formats_of(self._recipe))]
            told = keys[name] = _hash(json.dumps(told, sort_keys=True).encode())
        return keys

    def _known(self) -> dict[str, str]:
        """Keys of steps that an earlier run began or finished, and what it made of `out`, if it did."""
        try:
            known = json.loads((self._between / KEY).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _note(self, known: Mapping[str, str]) -> None:
        """Whole or not at all: without it all steps are forgotten. Raises ConfigError."""
        unfinished = self._between / f"{KEY}.unfinished"
        try:
            unfinished.write_text(json.dumps(known))
            unfinished.replace(self._between / KEY)
        except OSError as error:
            raise ConfigError(f"{self._between} cannot be written: {error}") from error

    def _remove_all_but(self, names: Set[str]) -> None:
        for path in self._between.glob("*"):
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _compress(self, model: str, recipe: Recipe, out: Path) -> CompressedFolder:
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

    def _heal(self, model: str, step: HealStep, out: Path) -> HealedFolder:
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


def _steps_of(recipe: Recipe) -> dict[str, Recipe | HealStep]:
    """In their order, by the names of their folders between steps; the last one makes `out`."""
    if (step := recipe.heal) is None or step.after_rounding:
        whole = without(recipe, "heal", "calibrate")
        return {"rounded": whole} if step is None else {"rounded": whole, "healed": step}
    steps: dict[str, Recipe | HealStep] = {}
    if recipe.prune is not None:
        steps["pruned"] = pruning_alone(recipe)
    steps["healed"] = step
    if recipe.rounds:
        steps["rounded"] = without(recipe, "prune", "heal", "calibrate")
    return steps


def _info_hash(out: Path) -> str:
    """Of what the folder `out` says of itself; "" of one that is not there, or no model of ours."""
    try:
        return _hash((out / INFO).read_bytes())
    except OSError:
        return ""


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def _formats_of(recipe: Recipe) -> DecoderFormats:
    """That it rounds to; of a `mixed` one with those of its first choice, whose planes all have."""
    if recipe.mixed is None:
        return recipe.formats()
    first = recipe.choices[0].format()
    return DecoderFormats(first, first, first, recipe.lm_head.format())


def _leaves(recipe: Recipe) -> bool:
    """Anything but healing and calibrating."""
    return recipe.rounds or recipe.prune is not None
