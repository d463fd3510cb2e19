"""From a name, a folder or a file to weights in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Tokenizer

from sparserve.errors import CorruptCheckpoint, ModelNotFound
from sparserve.model import catalog
from sparserve.model.config import ModelConfig
from sparserve.model.gguf_checkpoint import GGUFCheckpoint
from sparserve.model.safetensors_checkpoint import SafetensorsCheckpoint
from sparserve.model.weights import ModelWeights, TensorNames, assemble

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# (tensors read, tensors in all)
LoadProgress = Callable[[int, int], None]


class Checkpoint(Protocol):
    """A file format: a class with these members, and a line in `open_checkpoint`."""

    names: TensorNames
    config: ModelConfig

    @property
    def tensor_count(self) -> int: ...
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


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises ModelNotFound, UnsupportedModel or CorruptCheckpoint."""
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.suffix == ".gguf" and path.is_file():
        return GGUFCheckpoint(path)
    raise ModelNotFound(
        f"no model at {str(path)!r}: expected a folder with config.json and *.safetensors, a .gguf file, "
        f"or one of the names {', '.join(catalog.CATALOG)}"
    )


def load_model(
    model: str,
    *,
    dtype: str = "auto",
    on_tensor: LoadProgress = lambda done, total: None,
    on_download: catalog.DownloadProgress = lambda what, done, total: None,
) -> LoadedModel:
    """Load `model`: a name of the catalog, a Hugging Face folder or a GGUF file.

    `dtype` is "auto" (the checkpoint's own; float32 for quantized GGUF) or a key of DTYPES. Tensors
    already in that dtype stay memory-mapped; others are converted one at a time.

    Raises ModelNotFound, DownloadFailed, UnsupportedModel or CorruptCheckpoint.
    """
    path = (
        catalog.fetch(model, on_download) if model in catalog.CATALOG else Path(model).expanduser()
    )
    checkpoint = open_checkpoint(path)
    target = checkpoint.native_dtype if dtype == "auto" else DTYPES[dtype]
    total = checkpoint.tensor_count
    done = 0

    def read(name: str) -> torch.Tensor:
        nonlocal done
        tensor = checkpoint.read(name)
        done += 1
        on_tensor(min(done, total), total)
        # Norm weights are used in float32 and cost nothing; matrices must be contiguous rows.
        return (tensor.float() if tensor.dim() == 1 else tensor.to(target)).contiguous()

    weights = assemble(checkpoint.config, checkpoint.names, read, checkpoint.rope_factors)
    tokenizer = checkpoint.tokenizer()
    if tokenizer.get_vocab_size() > checkpoint.config.vocab_size:
        raise CorruptCheckpoint(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the embedding only "
            f"{checkpoint.config.vocab_size} rows"
        )
    name = (
        model if model in catalog.CATALOG else path.stem if path.is_file() else path.resolve().name
    )
    return LoadedModel(name, checkpoint.config, weights, tokenizer, checkpoint.chat_template())
