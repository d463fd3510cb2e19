"""The GGUF files that rivals load: the model that we measure, in their formats, cached.

Quantizing needs llama-cpp-python, which does it as llama.cpp's own tool.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import tempfile
from dataclasses import fields
from pathlib import Path

import torch
from gguf import GGUFReader

from sparserve.bench.peers.packages import llama_cpp
from sparserve.bench.to_gguf import GGUF_DTYPES, write_gguf
from sparserve.errors import UnsupportedModel
from sparserve.model.catalog import cache_dir
from sparserve.model.loader import LoadedModel
from sparserve.model.weights import GGUF_NAMES

QUANTIZED = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_1", "Q4_0")
GGUF_FORMATS = (*GGUF_DTYPES, *QUANTIZED)


def gguf_file(model: LoadedModel, format: str) -> Path:
    """`model` in `format`, one of GGUF_FORMATS; written where no earlier run has left it.

    Files are named by a hash of the weights. Raises UnsupportedModel of a model that llama.cpp cannot
    express, ConfigError where the cache cannot be written or llama-cpp-python is missing.
    """
    folder = cache_dir() / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{model.name.replace('/', '--')}-{_digest(model)}-{format}.gguf"
    if path.is_file():
        return path
    if format in GGUF_DTYPES:
        write_gguf(model, path, format)
        return path
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, unfinished = Path(scratch) / "source.gguf", Path(scratch) / path.name
        write_gguf(model, source, str(model.weights.dtype).removeprefix("torch."))
        _quantize(source, unfinished, format)
        unfinished.replace(path)
    return path


def step_weight_bytes(path: Path) -> int:
    """Bytes of a file's weights that a decode step reads: all but the embedding, of which it takes one
    row; a tied one is read as LM head.
    """
    sizes = _tensor_bytes(path)
    embedding = sizes[GGUF_NAMES.embedding] if GGUF_NAMES.lm_head in sizes else 0
    return sum(sizes.values()) - embedding


def mlp_weight_bytes(path: Path) -> int:
    """Those of the feed-forward layers among them."""
    matrices = tuple(GGUF_NAMES.layer[name].format(i="") for name in ("w_gate", "w_up", "w_down"))
    ends = tuple(name.removeprefix("blk.") for name in matrices)
    return sum(size for name, size in _tensor_bytes(path).items() if name.endswith(ends))


@functools.cache  # reading the vocabulary takes seconds
def _tensor_bytes(path: Path) -> dict[str, int]:
    return {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}


def _digest(model: LoadedModel) -> str:
    """Of everything in the file: configuration, weights, vocabulary."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr(model.config).encode())
    digest.update(model.tokenizer.to_str().encode())
    weights = model.weights
    layers = (getattr(layer, field.name) for layer in weights.layers for field in fields(layer))
    for tensor in (weights.embedding, weights.norm, weights.lm_head, *layers):
        if tensor is not None:
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _quantize(source: Path, target: Path, format: str) -> None:
    api = llama_cpp()
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{format}")
    status = api.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(parameters))
    if status != 0:
        raise UnsupportedModel(
            f"llama.cpp cannot quantize this model to {format} (status {status})"
        )
