"""Folders of compressed models, written layer by layer.

All is written to `OUT.partial`, each file under another name first, and renamed to OUT at the end: what is
at OUT is whole. An interrupted run goes on with the layers that are in `OUT.partial`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path

import torch

from sparse_kernels.weights import EndTensors, LayerTensors
from sparserve.errors import ConfigError, CorruptCheckpoint, ModelError, UnsupportedModel
from sparserve.model.compressed_checkpoint import (
    ENDS,
    INFO,
    LAYERS,
    CompressionInfo,
    Source,
    is_compressed,
    layer_file,
    read_info,
    read_layer_file,
)
from sparserve.model.compressed_tensors import (
    Spec,
    end_specs,
    fault,
    layer_specs,
    read_tensors,
    tensors_of_ends,
    tensors_of_layer,
)
from sparserve.model.identity import hash_of_files
from sparserve.model.loader import LoadedModel
from sparserve.model.safetensors_checkpoint import HuggingFaceFolder
from sparserve.sparsity.index import save_whole

# What a folder has beside weights; what the source lacks is left out.
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
UNFINISHED = ".unfinished"


def source_of(model: LoadedModel) -> Source:
    """What `CompressionInfo` tells of the model that is compressed. Reads its files once.

    Raises UnsupportedModel as `check_source`, ConfigError where it cannot be read.
    """
    check_source(model.path)
    try:
        return Source(model.name, str(model.path.resolve()), hash_of_files(model.path))
    except OSError as error:
        raise ConfigError(f"the files of {model.path} cannot be read: {error}") from error


def check_source(path: Path) -> None:
    """Raises UnsupportedModel of what is there and no Hugging Face folder, or compressed already."""
    if is_compressed(path):
        raise UnsupportedModel(
            f"{path} is compressed already, from {read_info(path).source.path}; compress that"
        )
    if path.is_file():
        raise UnsupportedModel(
            f"{path} is a GGUF file, whose config and tokenizer cannot be kept as they are; give the "
            "Hugging Face folder of the model"
        )


def partial_of(out: Path) -> Path:
    """Where `out`, which is not there yet, is written until it is whole. Raises ConfigError of a path that
    cannot be looked at."""
    partial = out.with_name(f"{out.name}.partial")
    with _told_as_config_error(partial):
        partial.exists()  # raises of a name that is too long, or beyond our rights
    return partial


def refuse_existing(out: Path) -> None:
    """Raises ConfigError where there is something at `out`, be it a link to nowhere."""
    if os.path.lexists(out):
        raise ConfigError(f"{out} is there already; remove it, or take another --out")


class CheckpointWriter:
    """One folder on its way to `out`. All methods raise ConfigError where a file cannot be written."""

    def __init__(self, out: Path, info: CompressionInfo) -> None:
        """Goes on where a run for the same recipe, formats, source and texts, of the same sparserve, stopped;
        begins anew in the place of another run's.

        Raises ConfigError where there is something at `out` already, or something else at `out`.partial, and
        ModelError of a source without a config, or of an `info` that cannot be read again.
        """
        self.out = out
        refuse_existing(out)
        self.folder = partial_of(out)
        source = Path(info.source.path)
        self.config = HuggingFaceFolder(source).config
        self.info = info.with_bits(self.config)
        with _told_as_config_error(self.folder):
            if not self._goes_on():
                self._clear()
            (self.folder / LAYERS).mkdir(parents=True, exist_ok=True)
            for file in self.folder.rglob(f"*{UNFINISHED}"):
                file.unlink()
            _write_whole(self.folder / INFO, _as_json(self.info))
            for name in COPIED:
                if (source / name).is_file():
                    _write_whole(self.folder / name, (source / name).read_bytes())
        # Told now, not after hours: a recipe or a path that JSON cannot hold.
        self.info = read_info(self.folder)

    def finished_layers(self) -> list[int]:
        """The first ones, as many as are written and undamaged."""
        return list(takewhile(self._is_finished, range(self.config.num_layers)))

    def read_layer(self, index: int) -> LayerTensors:
        """A finished one. Raises CorruptCheckpoint."""
        plan = self.info.formats.layer(index)
        return read_layer_file(layer_file(self.folder, index), self.config, plan)

    def write_layer(self, index: int, layer: LayerTensors) -> None:
        """Raises ValueError of tensors that are not in the formats of `info`, or not finite."""
        path = layer_file(self.folder, index)
        self._save(path, tensors_of_layer(layer), self._specs(index))

    def finish(self, ends: EndTensors) -> None:
        """Raises ValueError of ends as `write_layer`, or where a layer is missing; ConfigError where
        there is something at `out` by now."""
        specs = end_specs(self.config, self.info.formats)
        self._save(self.folder / ENDS, tensors_of_ends(ends), specs)
        if (finished := len(self.finished_layers())) < self.config.num_layers:
            raise ValueError(f"layer {finished} is not written yet")
        refuse_existing(self.out)
        with _told_as_config_error(self.out):
            self.folder.rename(self.out)

    def _specs(self, index: int) -> dict[str, Spec]:
        return layer_specs(self.config, self.info.formats.layer(index))

    def _goes_on(self) -> bool:
        try:
            return _same_run(self.info, read_info(self.folder).with_bits(self.config))
        except (ModelError, ValueError):
            return False

    def _clear(self) -> None:
        """Remove what another run left. Raises ConfigError of what no run did."""
        left = list(self.folder.iterdir()) if self.folder.exists() else []
        if any(path.name == INFO for path in left):
            for path in left:  # not the folder: whoever writes to it may have locked it
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif any(path.name != LAYERS and not path.name.endswith(UNFINISHED) for path in left):
            raise ConfigError(
                f"{self.folder} is there and no unfinished checkpoint; remove it, or take another --out"
            )

    def _is_finished(self, index: int) -> bool:
        path = layer_file(self.folder, index)
        try:
            return path.is_file() and bool(read_tensors(path, self._specs(index)))
        except CorruptCheckpoint:
            return False

    def _save(
        self, path: Path, tensors: Mapping[str, torch.Tensor], specs: Mapping[str, Spec]
    ) -> None:
        if wrong := fault(tensors, specs):
            raise ValueError(f"{path.stem}: {wrong}")
        with _told_as_config_error(path):
            save_whole(path, tensors, {"format": "pt"})


def _as_json(info: CompressionInfo) -> bytes:
    return (json.dumps(asdict(info), indent=2, sort_keys=True) + "\n").encode()


def _same_run(one: CompressionInfo, other: CompressionInfo) -> bool:
    """Whether layers of one are those of the other: wherever the source is, and whatever it is called."""
    same_source = one.source.hash == other.source.hash
    return same_source and _as_json(one) == _as_json(replace(other, source=one.source))


@contextmanager
def _told_as_config_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error


def _write_whole(path: Path, content: bytes) -> None:
    """A file that appears whole or not at all."""
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_bytes(content)
    unfinished.replace(path)
