"""Folders that `sparserve compress` makes: what they are, and how they are read.

    config.json, generation_config.json, tokenizer files, chat template   of the source, as they were; of a
                                GGUF file the same in these terms
    compression.json            CompressionInfo
    layers/00000.safetensors    a layer; `compressed_tensors` says which tensors
    ends.safetensors            embedding, norm, and the LM head unless it is the embedding

They come from outside: everything in them is checked before it is used.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from sparse_kernels.formats import DecoderFormats, LayerFormats
from sparse_kernels.weights import EndTensors, LayerTensors
from sparserve import __version__
from sparserve.errors import CorruptCheckpoint, UnsupportedModel
from sparserve.model.compressed_tensors import (
    bits_per_weight,
    end_specs,
    ends_of,
    layer_of,
    layer_specs,
    read_tensors,
)
from sparserve.model.config import LayerSize, ModelConfig
from sparserve.model.layers_at_use import LayersAtUse
from sparserve.model.safetensors_checkpoint import HuggingFaceFolder, read_json

# Written is the first version that has all that is in a folder.
VERSION, WITH_BIASES = 1, 2
NEWEST = WITH_BIASES
INFO, ENDS, LAYERS = "compression.json", "ends.safetensors", "layers"


# Of the projection after attention, of that of the feed-forward.
AddedBias = Literal["output", "down"]


@dataclass(frozen=True, slots=True)
class Source:
    """A model that another was made of."""

    name: str
    path: str  # where it was then
    hash: str  # of its files, `identity.hash_of_files`


@dataclass(frozen=True, slots=True)
class CompressionInfo:
    """What is in a folder and how it was made."""

    recipe: Mapping[str, Any]  # JSON values, as given
    formats: DecoderFormats
    source: Source  # the original
    texts: tuple[str, ...] = ()  # hashes of the files that it was calibrated on
    sparserve_version: str = __version__
    format_version: int = VERSION
    # Of the layers' matrices, and of all that is stored; `with_bits` sets them.
    bits_per_decoder_weight: float = 0
    bits_per_weight: float = 0
    layer_sizes: tuple[
        LayerSize, ...
    ] = ()  # of each layer of a pruned model; (): as config.json says
    added_biases: tuple[AddedBias, ...] = ()  # that the source does not have
    healing: Mapping[str, Any] | None = None  # how it was healed; None: it was not
    # The folder, made of `source`, that this one was made of, and the recipes that it had followed; None, (): of
    # `source` itself.
    made_of: Source | None = None
    earlier: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.added_biases)) < len(self.added_biases):
            raise ValueError(f"added_biases are {self.added_biases}, one of them twice")
        if self.added_biases and self.format_version < WITH_BIASES:
            raise ValueError(
                f"there are added_biases, which came with format version {WITH_BIASES}, and this is "
                f"{self.format_version}"
            )

    def config(self, source: ModelConfig) -> ModelConfig:
        """Of what is stored. Raises CorruptCheckpoint of sizes that the source cannot have been cut to, and of
        added biases that it has."""
        made = source.pruned(self.layer_sizes) if self.layer_sizes else source
        for name in self.added_biases:
            if getattr(made, f"{name}_bias"):
                raise CorruptCheckpoint(
                    f"added_biases names {name}, and config.json says that the source has one"
                )
        return made.with_biases(self.added_biases)

    def with_bits(self, config: ModelConfig) -> CompressionInfo:
        """Raises ValueError of formats for a layer that the model does not have."""
        self.formats.check_layers(config.num_layers)
        decoder, whole = bits_per_weight(config, self.formats)
        return replace(self, bits_per_decoder_weight=decoder, bits_per_weight=whole)


@dataclass(frozen=True, slots=True)
class CompressedWeights:
    """The weights as they are stored, for a backend that packs them."""

    info: CompressionInfo
    layers: Sequence[LayerTensors]  # read and checked when they are asked for: CorruptCheckpoint
    ends: EndTensors

    @property
    def formats(self) -> DecoderFormats:
        return self.info.formats


def is_compressed(path: Path) -> bool:
    return os.path.isfile(path / INFO)  # unlike Path's, never raises


def layer_file(folder: Path, index: int) -> Path:
    return folder / LAYERS / f"{index:05d}.safetensors"


class CompressedCheckpoint(HuggingFaceFolder):
    """One folder, whose layers are read at their use."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelNotFound, UnsupportedModel or CorruptCheckpoint."""
        super().__init__(folder)
        info = read_info(folder)
        self._check_files()
        try:
            self.config = info.config(self.config)
            self.info = info.with_bits(self.config)
        except ValueError as error:
            raise CorruptCheckpoint(f"{folder / INFO}: {error}") from error

    def weights(self, on_read: Callable[[Path], None]) -> CompressedWeights:
        """`on_read` is told of each file that was read. Raises CorruptCheckpoint."""
        config, formats, path = self.config, self.info.formats, self.folder / ENDS
        ends = ends_of(read_tensors(path, end_specs(config, formats)), config, formats)
        on_read(path)
        return CompressedWeights(
            self.info, CompressedLayers(self.folder, config, formats, on_read), ends
        )

    def _check_files(self) -> None:
        """The count of layers comes from outside; what is planned for each must not come before this."""
        folder, count = self.folder / LAYERS, self.config.num_layers
        found = {path.name for path in folder.glob("*.safetensors")}
        if len(found) != count:
            raise CorruptCheckpoint(
                f"{folder} has the files of {len(found)} layers, and config.json asks for {count}"
            )
        expected = [layer_file(self.folder, i) for i in range(count)]
        for path in (*expected, self.folder / ENDS):
            if not path.is_file():
                raise CorruptCheckpoint(f"{path} is missing")


class CompressedLayers(LayersAtUse[LayerTensors]):
    """The layers in the files of a folder; none is kept."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        formats: DecoderFormats,
        on_read: Callable[[Path], None],
    ) -> None:
        self._folder, self._config, self._formats = folder, config, formats
        self._on_read = on_read

    def __len__(self) -> int:
        return self._config.num_layers

    def layer(self, index: int) -> LayerTensors:
        path = layer_file(self._folder, index)
        layer = read_layer_file(path, self._config, index, self._formats.layer(index))
        self._on_read(path)
        return layer


def read_layer_file(
    path: Path, config: ModelConfig, index: int, formats: LayerFormats
) -> LayerTensors:
    """Raises CorruptCheckpoint."""
    tensors = read_tensors(path, layer_specs(config, index, formats))
    return layer_of(tensors, config, index, formats)


def read_info(folder: Path) -> CompressionInfo:
    """Raises CorruptCheckpoint, or UnsupportedModel of a newer version."""
    path = folder / INFO
    raw = read_json(path)
    if raw is None:
        raise CorruptCheckpoint(f"{path} is missing")
    version = raw.get("format_version")
    if type(version) is not int or version < 1:
        raise CorruptCheckpoint(
            f"{path}: format_version is {reprlib.repr(version)}, expected {VERSION} to {NEWEST}"
        )
    if version > NEWEST:
        by = reprlib.repr(raw.get("sparserve_version"))
        raise UnsupportedModel(
            f"{path} has format version {version}, made by sparserve {by}; sparserve {__version__} reads "
            f"version {NEWEST}: install a newer one, or compress the original again"
        )
    try:
        # Of JSON, for strict dataclasses take no dictionaries of Python.
        return TypeAdapter(CompressionInfo).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CorruptCheckpoint(f"{path}: {where}: {first['msg']}") from error
