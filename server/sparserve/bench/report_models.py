"""The compressed models of a report: folders that are there, and recipes that it follows first."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparserve.bench.rounds import BenchProgress
from sparserve.bench.text import read_text, refuse_calibration_text
from sparserve.compression.recipe import Recipe, read_recipe
from sparserve.errors import ConfigError, CorruptCheckpoint
from sparserve.model.compress_folder import compress_folder, refuse_steps
from sparserve.model.compressed_checkpoint import (
    INFO,
    CompressedCheckpoint,
    CompressionInfo,
    is_compressed,
    read_info,
)
from sparserve.model.compressed_writer import check_source
from sparserve.model.compressing import check_recipe
from sparserve.model.identity import hash_of_files
from sparserve.model.loader import LoadedModel
from sparserve.model.text import hashes_of, read_windows

MODELS = "models"  # folder in --out


@dataclass(frozen=True, slots=True)
class CompressedModel:
    name: str  # of its recipe, or of the folder that was given
    folder: Path  # where it is, or will be
    recipe: Recipe | None  # None: it is there


def parse_recipes(text: str, out: Path) -> list[CompressedModel]:
    """Names of shipped recipes, YAML files and folders that were compressed, pruned or healed, comma-separated; `none`
    stands for no recipe. Raises ConfigError, and ModelError of a folder that cannot be used.
    """
    found = []
    for word in dict.fromkeys(part.strip() for part in text.split(",")):
        if word == "none":
            continue
        path = Path(word).expanduser()
        if not path.is_dir():
            recipe = read_recipe(word)
            found.append(CompressedModel(recipe.name, out / MODELS / recipe.name, recipe))
        elif is_compressed(path):
            found.append(CompressedModel(path.resolve().name, path, None))
        else:
            raise ConfigError(
                f"{word} of --recipes is a folder, and not of a model that was compressed, pruned or healed"
            )
    return found


def check_texts(models: Sequence[CompressedModel], texts: Sequence[Path], evaluated: Path) -> None:
    """Raises ConfigError where a recipe lacks a text, where none needs one, and of an evaluation on a text that
    a model is fitted to."""
    needy = [own.name for own in models if own.recipe is not None and own.recipe.needs_text]
    if needy and not texts:
        raise ConfigError(
            f"the recipe {needy[0]} needs a text to measure inputs on: give --compress-text, one like what "
            "will be served, and not the one that is evaluated"
        )
    if texts and not needy:
        raise ConfigError("--compress-text is for recipes that need a text, and there is none")
    read_text(evaluated)
    refuse_calibration_text(evaluated, "recipe", hashes_of(texts))
    for own in models:
        if own.recipe is None:
            refuse_calibration_text(evaluated, f"model {own.name}", read_info(own.folder).texts)


def check_models(
    models: Sequence[CompressedModel], source: LoadedModel, texts: Sequence[Path]
) -> None:
    """What would stop a run after hours. Folders are of `source` by the hash that they tell, however many steps made
    them. Raises ConfigError of one of another model, or by another recipe of that name, of recipes and texts that do
    not fit `source`, and where that is compressed itself; ModelError of a folder that cannot be read, or where
    `source` cannot be compressed.
    """
    if is_compressed(source.path):
        original = read_info(source.path).source.path
        raise ConfigError(
            f"--model {source.path} was made of {original}, and a report compares with an original: give that as "
            "--model, and this with --recipes"
        )
    source_hash = hash_of_files(source.path) if models else ""
    for own in models:
        if own.recipe is not None:
            refuse_steps(own.recipe)
        if own.folder.exists():
            _check_folder(own, source, source_hash, texts)
        elif own.recipe is not None:
            check_source(source)
            check_recipe(source.config, own.recipe)
            if own.recipe.needs_text:
                size = own.recipe.calibration
                read_windows(source, texts, size.windows, size.tokens)


def _check_folder(
    own: CompressedModel, source: LoadedModel, source_hash: str, texts: Sequence[Path]
) -> None:
    info = CompressedCheckpoint(own.folder).info
    healed_through(own.folder)
    if info.source.hash != source_hash:
        raise ConfigError(
            f"{own.folder} was made of {info.source.name} with hash {info.source.hash:.12}, and --model is "
            f"{source.name} with {source_hash:.12}; all of a report must be of one original: give that as --model, or "
            "leave this out of --recipes"
        )
    if own.recipe is not None and not _follows(info, own.recipe, texts):
        raise ConfigError(
            f"{own.folder} was compressed by another recipe named {own.name}, or on other texts; remove "
            "it, or take another --out"
        )


def healed_through(folder: Path) -> str | None:
    """What a compressed model was healed through; None where it was not. Raises CorruptCheckpoint."""
    healing = read_info(folder).healing
    if healing is None:
        return None
    through = healing.get("through")
    if not isinstance(through, str) or not through.isprintable() or not through:
        raise CorruptCheckpoint(
            f"{folder / INFO}: healing.through is {reprlib.repr(through)}, and must say in words what it was healed "
            "through, as in core:0.5"
        )
    return through


def _follows(info: CompressionInfo, recipe: Recipe, texts: Sequence[Path]) -> bool:
    same = info.recipe == recipe.model_dump(mode="json")
    return same and (not recipe.needs_text or list(info.texts) == hashes_of(texts))


def compress_missing(
    model: str,
    models: Sequence[CompressedModel],
    texts: Sequence[Path],
    on_progress: BenchProgress,
) -> None:
    """Raises as `compress_folder`."""
    for own in models:
        if own.recipe is not None and not own.folder.exists():
            own.folder.parent.mkdir(parents=True, exist_ok=True)

            def on_layer(done: int, total: int, name: str = own.name) -> None:
                on_progress(f"compressing: {name}", done, total)

            compress_folder(model, own.recipe, texts, own.folder, on_layer=on_layer)
