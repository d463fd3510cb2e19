"""Folders of compressed models, written layer by layer.

All is written to `OUT.partial`, each file under another name first, and renamed to OUT at the end: what is
at OUT is whole. An interrupted run goes on with the layers that are in `OUT.partial`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from sparse_kernels.formats import DecoderFormats
from sparse_kernels.weights import EndTensors, LayerTensors
from sparserve import __version__
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
from sparserve.model.config import ModelConfig
from sparserve.model.fields import naming
from sparserve.model.gguf_checkpoint import GGUFCheckpoint
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


def first_info(
    model: LoadedModel, recipe: Mapping[str, Any], formats: DecoderFormats
) -> CompressionInfo:
    """Of what is made of `model`, a folder that was pruned or healed before among them: what is known of that one
    stays true. Reads its files once.

    Raises UnsupportedModel of GGUF files whose config a folder cannot hold, ConfigError where it cannot be read.
    """
    _check_words(model)
    own = _source_of(model)
    if model.compressed is None:
        return CompressionInfo(recipe, formats, own)
    before = model.compressed.info
    return replace(
        before,
        recipe=recipe,
        formats=formats,
        made_of=own,
        earlier=(*before.earlier, before.recipe),
        sparserve_version=__version__,
        bits_per_decoder_weight=0,
        bits_per_weight=0,
    )


def _source_of(model: LoadedModel) -> Source:
    with _told_as_config_error(model.path, "read"):
        return Source(model.name, str(model.path.resolve()), hash_of_files(model.path))


def check_source(model: LoadedModel) -> None:
    """Raises UnsupportedModel of what is rounded already, and as `first_info`."""
    refuse_rounded(model.path)
    _check_words(model)


def _check_words(model: LoadedModel) -> None:
    if model.weights.rope_factors is not None:
        raise UnsupportedModel(
            f"{model.path} has RoPE factors as a tensor, rope_freqs.weight, and folders of compressed models have "
            "no place for one; give the Hugging Face folder of the model"
        )
    if model.path.is_file():
        with naming(model.path):
            model.config.to_hf()


def refuse_rounded(path: Path) -> None:
    """Raises UnsupportedModel of a folder with integers; one that was only pruned or healed can be rounded."""
    if is_compressed(path) and read_info(path).formats.quantized:
        raise UnsupportedModel(
            f"{path} is compressed already, from {read_info(path).source.path}; compress that"
        )


def _beside_weights(source: Path) -> tuple[ModelConfig, dict[str, bytes]]:
    """(the config, the files by name) of a folder, as they are, or of a GGUF file, in their terms.

    Raises ModelError.
    """
    if source.is_file():
        gguf = GGUFCheckpoint(source)
        made = {"config.json": _as_json(gguf.config.to_hf())}
        made["tokenizer.json"] = gguf.tokenizer().to_str().encode()
        # As JSON: a file of its own would be read with other ends of lines.
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": gguf.chat_template()}
        return gguf.config, made | {"tokenizer_config.json": _as_json(told)}
    files = {name: source / name for name in COPIED}
    there = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    return HuggingFaceFolder(source).config, there


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


@contextmanager
def alone_with(out: Path) -> Iterator[None]:
    """No other process compresses to `out` meanwhile: layers of two runs would mix. Raises ConfigError where one
    does, or where nothing can be written, or something else is where `out` is written."""
    partial = partial_of(out)
    while not _is_of(lock := _locked(partial, out), partial):
        os.close(lock)  # whoever had it has removed or renamed it since: the lock is of nothing
    try:
        _refuse_foreign(partial)
        yield
    finally:
        with suppress(OSError):
            if _is_of(lock, partial):  # else it was renamed, and this is another run's
                partial.rmdir()  # if nothing is in it
        os.close(lock)  # which gives it up, as the process's end does


def _refuse_foreign(partial: Path) -> None:
    """Raises ConfigError of what no run left."""
    with _told_as_config_error(partial, "read"):
        names = {path.name for path in partial.iterdir()} if partial.exists() else set()
    if INFO not in names and any(n != LAYERS and not n.endswith(UNFINISHED) for n in names):
        raise ConfigError(
            f"{partial} is there and no unfinished checkpoint; remove it, or take another --out"
        )


def _locked(partial: Path, out: Path) -> int:
    """A descriptor of the folder `partial`, with its lock. Raises ConfigError."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"{partial} cannot be written: {error}; take another --out") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ConfigError(
            f"another process compresses to {out}; wait for it, or take another --out"
        ) from error
    return lock


def _is_of(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except OSError:
        return False


class CheckpointWriter:
    """One folder on its way to `out`. All methods raise ConfigError where a file cannot be written or read."""

    def __init__(self, out: Path, info: CompressionInfo) -> None:
        """Goes on where a run for the same recipe, formats, source and texts, of the same sparserve, stopped;
        begins anew in the place of another run's.

        Raises ConfigError where there is something at `out` already, or something else at `out`.partial, and
        ModelError of a source without a config, or of an `info` that cannot be read again.
        """
        self.out = out
        refuse_existing(out)
        self.folder = partial_of(out)
        source = Path((info.made_of or info.source).path)
        with _told_as_config_error(source, "read"):
            self.config, files = _beside_weights(source)
        self.config = info.config(self.config)
        self.info = info.with_bits(self.config)
        with _told_as_config_error(self.folder):
            if not self._goes_on():
                self._clear()
            (self.folder / LAYERS).mkdir(parents=True, exist_ok=True)
            for file in self.folder.rglob(f"*{UNFINISHED}"):
                file.unlink()
            _write_whole(self.folder / INFO, _as_json(asdict(self.info)))
            for name, content in files.items():
                _write_whole(self.folder / name, content)
        # Told now, not after hours: a recipe or a path that JSON cannot hold.
        self.info = read_info(self.folder)

    def finished_layers(self) -> list[int]:
        """The first ones, as many as are written and undamaged."""
        return list(takewhile(self._is_finished, range(self.config.num_layers)))

    def read_layer(self, index: int) -> LayerTensors:
        """A finished one. Raises CorruptCheckpoint."""
        plan = self.info.formats.layer(index)
        return read_layer_file(layer_file(self.folder, index), self.config, index, plan)

    def write_file(self, name: str, content: bytes) -> None:
        """One beside the layers, in the place of what had this name; it appears whole or not at all."""
        with _told_as_config_error(self.folder / name):
            _write_whole(self.folder / name, content)

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
        return layer_specs(self.config, index, self.info.formats.layer(index))

    def _goes_on(self) -> bool:
        try:
            return _same_run(self.info, read_info(self.folder).with_bits(self.config))
        except (ModelError, ValueError):
            return False

    def _clear(self) -> None:
        """Remove what another run left. Raises ConfigError of what no run did."""
        _refuse_foreign(self.folder)
        if (self.folder / INFO).exists():
            for path in self.folder.iterdir():  # not the folder: whoever writes may have locked it
                shutil.rmtree(path) if path.is_dir() else path.unlink()

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


def _as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _same_run(one: CompressionInfo, other: CompressionInfo) -> bool:
    """Whether layers of one are those of the other: wherever the sources are, and whatever they are called."""
    own, others = ((x.source.hash, x.made_of and x.made_of.hash) for x in (one, other))
    there = replace(other, source=one.source, made_of=one.made_of)
    return own == others and _as_json(asdict(one)) == _as_json(asdict(there))


@contextmanager
def _told_as_config_error(path: Path, done: str = "written") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be {done}: {error}") from error


def _write_whole(path: Path, content: bytes) -> None:
    """A file that appears whole or not at all."""
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_bytes(content)
    unfinished.replace(path)
