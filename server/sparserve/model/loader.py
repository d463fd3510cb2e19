"""From a name, a folder, a file or a hub id to weights in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Tokenizer

from sparserve.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from sparserve.model import catalog
from sparserve.model.compressed_checkpoint import (
    CompressedCheckpoint,
    CompressedWeights,
    is_compressed,
)
from sparserve.model.config import ModelConfig
from sparserve.model.effective import effective, effective_head
from sparserve.model.gguf_checkpoint import GGUFCheckpoint
from sparserve.model.hub import cached_model
from sparserve.model.placement import PlacedLayers, Placement, plan
from sparserve.model.safetensors_checkpoint import SafetensorsCheckpoint
from sparserve.model.weights import (
    LayerWeights,
    ModelWeights,
    TensorNames,
    assemble,
    layer_shapes,
    read_layer,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# (tensors read, tensors in all)
LoadProgress = Callable[[int, int], None]


class Checkpoint(Protocol):
    """A file format: a class with these members, and a line in `open_checkpoint`."""

    names: TensorNames
    config: ModelConfig

    @property
    def tensor_names(self) -> frozenset[str]: ...
    @property
    def native_dtype(self) -> torch.dtype: ...
    @property
    def rope_factors(self) -> torch.Tensor | None: ...
    def read(self, name: str) -> torch.Tensor: ...
    def tokenizer(self) -> Tokenizer: ...
    def chat_template(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    name: str
    config: ModelConfig
    weights: ModelWeights
    tokenizer: Tokenizer
    chat_template: str | None
    path: Path  # of the checkpoint
    # Of a folder that `sparserve compress` or `heal` made: what `weights` are worked out of at each use.
    compressed: CompressedWeights | None = None

    @property
    def rounded(self) -> CompressedWeights | None:
        """`compressed` where there are integers in it, whose formats are then those that serve; a folder all in
        bfloat16, which was only pruned or healed, can be rounded like any other model."""
        own = self.compressed
        return own if own is not None and own.formats.quantized else None


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises ModelNotFound, UnsupportedModel or CorruptCheckpoint."""
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # too long a name, no permission
        raise ModelNotFound(f"no model at {str(path)!r}: {error}") from error
    if is_folder:
        return SafetensorsCheckpoint(path)
    if path.suffix == ".gguf" and is_file:
        return GGUFCheckpoint(path)
    raise ModelNotFound(
        f"no model at {str(path)!r}: expected a folder with config.json and *.safetensors, a .gguf file, "
        f"the id org/name of a model in the Hugging Face cache, or one of the names "
        f"{', '.join(catalog.CATALOG)}"
    )


def find_model(model: str, on_download: catalog.DownloadProgress) -> tuple[str, Path]:
    """(the name to serve it under, where it is). Raises DownloadFailed."""
    if model in catalog.CATALOG:
        return model, catalog.fetch(model, on_download)
    path = Path(os.path.expanduser(model))  # unlike Path's, never raises
    if not os.path.exists(path) and (cached := cached_model(model)) is not None:
        return model, cached
    return (path.stem if os.path.isfile(path) else Path(os.path.abspath(path)).name), path


def _require_layers(path: Path, checkpoint: Checkpoint) -> None:
    """The count of layers comes from outside; what is planned for each must not come before this."""
    present = checkpoint.tensor_names
    for i in range(checkpoint.config.num_layers):
        name = checkpoint.names.layer["attn_norm"].format(i=i)
        if name not in present:
            raise CorruptCheckpoint(f"tensor {name} is missing from {path}")


def _refuse_unread(path: Path, checkpoint: Checkpoint) -> None:
    """A tensor that nothing here reads (a bias, an adapter) means another model than we would run."""
    names, config = checkpoint.names, checkpoint.config
    fields = layer_shapes(config, 0)
    known = {names.layer[field].format(i=i) for field in fields for i in range(config.num_layers)}
    known |= {names.embedding, names.norm, names.lm_head}  # tied files may repeat the head
    known |= {"rope_freqs.weight"}
    unread = sorted(
        name for name in checkpoint.tensor_names - known if not name.endswith("rotary_emb.inv_freq")
    )
    if unread:
        raise UnsupportedModel(
            f"{path} has {len(unread)} tensors that {checkpoint.config.architecture} does not use here, "
            f"such as {unread[0]}; running without them would give wrong text"
        )


def load_model(
    model: str,
    *,
    dtype: str = "auto",
    placement: Placement = Placement(),
    layers_at_use: bool = False,
    on_tensor: LoadProgress = lambda done, total: None,
    on_download: catalog.DownloadProgress = lambda what, done, total: None,
) -> LoadedModel:
    """Load `model`: a name of the catalog, a Hugging Face folder, one that `sparserve compress` made, a GGUF
    file or the hub id of a model in the Hugging Face cache.

    `dtype` is "auto" (the checkpoint's own; float32 for quantized GGUF, bfloat16 for what is
    compressed) or a key of DTYPES. Tensors already in that dtype stay memory-mapped; others are
    converted one at a time. Layers go straight to the devices of `placement`; with `layers_at_use`
    each is read when it is asked for and not kept, for a backend that makes a copy of its own.

    Raises ModelNotFound, DownloadFailed, UnsupportedModel, CorruptCheckpoint or, of a placement that
    cannot be, ConfigError.
    """
    name, path = find_model(model, on_download)
    if is_compressed(path):
        return _load_compressed(name, path, dtype, placement, layers_at_use, on_tensor)
    checkpoint = open_checkpoint(path)
    target = checkpoint.native_dtype if dtype == "auto" else DTYPES[dtype]
    total = len(checkpoint.tensor_names)
    read_names: set[str] = set()

    def read(name: str) -> torch.Tensor:
        tensor = checkpoint.read(name)
        if name not in read_names:  # layers may be read again
            read_names.add(name)
            on_tensor(len(read_names), total)
        # Norm weights are used in float32 and cost nothing; matrices must be contiguous rows.
        return (tensor.float() if tensor.dim() == 1 else tensor.to(target)).contiguous()

    _require_layers(path, checkpoint)
    config, names = checkpoint.config, checkpoint.names
    devices = plan(placement, config, target)
    weights = assemble(
        config,
        names,
        lambda name: read(name).to(devices.execution),
        lambda: PlacedLayers(
            partial(read_layer, config, names, read), devices, at_use=layers_at_use
        ),
        checkpoint.rope_factors,
    )
    _refuse_unread(path, checkpoint)
    return LoadedModel(
        name,
        config,
        weights,
        _tokenizer(path, checkpoint),
        checkpoint.chat_template(),
        path,
    )


def _load_compressed(
    name: str,
    path: Path,
    dtype: str,
    placement: Placement,
    layers_at_use: bool,
    on_tensor: LoadProgress,
) -> LoadedModel:
    """As `load_model`; `on_tensor` counts files."""
    checkpoint = CompressedCheckpoint(path)
    config, target = checkpoint.config, DTYPES["bfloat16" if dtype == "auto" else dtype]
    read: set[Path] = set()

    def on_read(file: Path) -> None:
        if file not in read:  # layers may be read again
            read.add(file)
            on_tensor(len(read), config.num_layers + 1)

    devices = plan(placement, config, target)
    compressed = checkpoint.weights(on_read)

    def layer(index: int) -> LayerWeights:
        return effective(compressed.layers[index], target)

    ends = compressed.ends
    embedding = ends.embedding.to(devices.execution, target)
    head = None if ends.lm_head is None else effective_head(ends.lm_head, target)
    weights = ModelWeights(
        embedding,
        PlacedLayers(layer, devices, at_use=layers_at_use),
        ends.norm.to(devices.execution),
        embedding if head is None else head.to(devices.execution),
    )
    return LoadedModel(
        name,
        config,
        weights,
        _tokenizer(path, checkpoint),
        checkpoint.chat_template(),
        path,
        compressed,
    )


def _tokenizer(path: Path, checkpoint: Checkpoint | CompressedCheckpoint) -> Tokenizer:
    tokenizer, vocab_size = checkpoint.tokenizer(), checkpoint.config.vocab_size
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= vocab_size:
        raise CorruptCheckpoint(
            f"the tokenizer of {path} has token ids up to {highest}, the embedding only {vocab_size} rows"
        )
    return tokenizer
