"""A model compressed into a folder: what `sparserve compress` does, and serving with `--compress`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sparse_kernels.weights import EndTensors
from sparserve.compression.matrix import MatrixReport
from sparserve.compression.recipe import Recipe
from sparserve.errors import ConfigError
from sparserve.model.catalog import DownloadProgress
from sparserve.model.compressed_checkpoint import WITH_BIASES, CompressionInfo
from sparserve.model.compressed_writer import (
    CheckpointWriter,
    alone_with,
    check_source,
    first_info,
    refuse_existing,
)
from sparserve.model.compressing import check_recipe, compress_layers, compress_lm_head
from sparserve.model.loader import LoadedModel, load_model
from sparserve.model.mixed import OnStep, allocate
from sparserve.model.pruning import OnLayer, Pruned, prune
from sparserve.model.text import TokenWindows, read_windows

# Beside the layers: the errors of their matrices, for whoever wants to know. A layer is a list of MatrixReport.
REPORTS = "reports.json"

# (layers finished, layers in all); first with those that an interrupted run has left
CompressProgress = Callable[[int, int], None]
LayerReports = Sequence[MatrixReport]


@dataclass(frozen=True, slots=True)
class CompressedFolder:
    """What was written."""

    info: CompressionInfo
    reports: Sequence[LayerReports]  # of each layer
    seconds: float  # of this run
    predicted_kl: float | None = None  # where the recipe lets formats be chosen; see `model.mixed`
    pruned: Pruned | None = None  # where the recipe removes something


def compress_folder(
    model: str,
    recipe: Recipe,
    texts: Sequence[Path],
    out: Path,
    *,
    on_layer: CompressProgress = lambda done, total: None,
    on_choice: OnStep = lambda done, total: None,
    on_prune: OnLayer = lambda done, total: None,
    on_download: DownloadProgress = lambda what, done, total: None,
) -> CompressedFolder:
    """Write `model`, what `load_model` takes, as a folder `out` that it takes as well.

    `texts` are what inputs are measured on; a recipe that needs none does not read them. A run that was
    interrupted goes on where it stopped, to the same bytes: see `CheckpointWriter` and `compress_layers`.
    `on_prune` and `on_choice` are told of steps before that, of a recipe with `prune` and one that is `mixed`: what is
    removed and formats are chosen in each run anew.

    Raises ModelError of a model that cannot be compressed, ConfigError of a recipe or texts that do not fit
    it, and where `out` cannot be written or is there already.
    """
    begun = time.monotonic()
    refuse_steps(recipe)
    refuse_existing(out)  # told now, not after formats are chosen
    require_text(recipe, texts)
    original = load_model(model, dtype="bfloat16", layers_at_use=True, on_download=on_download)
    check_source(original)
    check_recipe(original.config, recipe)
    windows = _windows(original, recipe, texts)
    with alone_with(out):  # before the steps that take long
        return _compress(original, recipe, windows, out, begun, on_layer, on_choice, on_prune)


def _compress(
    original: LoadedModel,
    recipe: Recipe,
    windows: TokenWindows | None,
    out: Path,
    begun: float,
    on_layer: CompressProgress,
    on_choice: OnStep,
    on_prune: OnLayer,
) -> CompressedFolder:
    source, pruned = original, None
    if recipe.prune is not None:
        token_ids = None if windows is None else windows.token_ids
        pruned = prune(original, recipe.prune, token_ids, on_prune)
        source = pruned.model
        check_recipe(source.config, recipe)
    followed, kl = recipe, None
    if recipe.mixed is not None:
        assert windows is not None
        chosen = allocate(source, recipe, windows.token_ids, on_choice)
        followed, kl = chosen.recipe, chosen.kl
    info = _with_what_was_done(
        first_info(original, recipe.model_dump(mode="json"), followed.formats()), windows, pruned
    )
    writer = CheckpointWriter(out, info)
    reports = _write_layers(source, followed, windows, writer, on_layer)
    weights, head = source.weights, compress_lm_head(source, followed)
    writer.finish(EndTensors(weights.embedding, weights.norm, head))
    return CompressedFolder(writer.info, reports, time.monotonic() - begun, kl, pruned)


def refuse_steps(recipe: Recipe) -> None:
    """Raises ConfigError of steps that train or measure, which nobody wants to wait for when a model is loaded."""
    if not recipe.is_one_step:
        step = "heals" if recipe.heal is not None else "calibrates"
        raise ConfigError(
            f"the recipe {recipe.name} {step}, which takes long: follow it once with `sparserve compress --recipe … "
            "--out FOLDER`, and name the folder"
        )


def _with_what_was_done(
    info: CompressionInfo, windows: TokenWindows | None, pruned: Pruned | None
) -> CompressionInfo:
    if windows is not None:
        info = replace(info, texts=tuple(dict.fromkeys((*info.texts, *windows.files))))
    if pruned is None:
        return info
    info = replace(info, layer_sizes=tuple(pruned.model.config.layers))
    if not pruned.added_biases:
        return info
    added = (*info.added_biases, *pruned.added_biases)
    return replace(info, format_version=WITH_BIASES, added_biases=added)


def require_text(recipe: Recipe, texts: Sequence[Path]) -> None:
    """Raises ConfigError where `recipe` needs one and there is none."""
    if not recipe.needs_text or texts:
        return
    ways = []
    if recipe.prune is not None and recipe.prune.needs_text:
        ways.append("prune.criterion magnitude or random with prune.restore none")
    if recipe.model_copy(update={"prune": None}).needs_text:
        ways.append("a recipe with quantizer rtn and compensate none or lorc")
    raise ConfigError(
        f"the recipe {recipe.name} needs a text to measure inputs on: give one like what will be served, "
        "--text of `sparserve compress`, --compress-text where a model is compressed when it is loaded; "
        f"or take {' and '.join(ways)}"
    )


def _windows(source: LoadedModel, recipe: Recipe, texts: Sequence[Path]) -> TokenWindows | None:
    if not recipe.needs_text:
        return None
    return read_windows(source, texts, recipe.calibration.windows, recipe.calibration.tokens)


def _write_layers(
    source: LoadedModel,
    recipe: Recipe,
    windows: TokenWindows | None,
    writer: CheckpointWriter,
    on_layer: CompressProgress,
) -> list[LayerReports]:
    """-> The reports of all layers, those of an interrupted run included."""
    total = source.config.num_layers
    reports = _read_reports(writer.folder / REPORTS)
    # A layer without its report is made again, to the same bytes.
    done = writer.finished_layers()[: len(reports)]
    del reports[len(done) :]
    on_layer(len(done), total)
    ids = None if windows is None else windows.token_ids
    for layer in compress_layers(source, recipe, ids, map(writer.read_layer, done)):
        reports.append(layer.reports)
        _write_reports(writer, reports)  # before the layer, which is finished once it is there
        writer.write_layer(layer.index, layer.tensors)
        on_layer(layer.index + 1, total)
    return reports


def _read_reports(path: Path) -> list[LayerReports]:
    """Of an interrupted run; none where the file is missing or damaged."""
    try:
        return TypeAdapter(list[LayerReports]).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return []


def _write_reports(writer: CheckpointWriter, reports: Sequence[LayerReports]) -> None:
    content = [[asdict(report) for report in layer] for layer in reports]
    writer.write_file(REPORTS, (json.dumps(content, indent=1) + "\n").encode())
