"""The GGUF files that rivals load: the model that we measure, in their formats, cached.

Quantizing needs llama-cpp-python, which does it as llama.cpp's own tool.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFReader

from sparserve.bench.cache import fingerprint, peer_cache
from sparserve.bench.peers.packages import llama_cpp
from sparserve.bench.to_gguf import GGUF_DTYPES, write_gguf
from sparserve.errors import UnsupportedModel
from sparserve.model.loader import LoadedModel
from sparserve.model.weights import GGUF_NAMES

QUANTIZED = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_1", "Q4_0")
GGUF_FORMATS = (*GGUF_DTYPES, *QUANTIZED)


def gguf_file(model: LoadedModel, format: str) -> Path:
    """`model` in `format`, one of GGUF_FORMATS; written where no earlier run has left it.

    Files are named by a hash of the weights. Raises UnsupportedModel of a model that llama.cpp cannot
    express, ConfigError where the cache cannot be written or llama-cpp-python is missing.
    """
    cache = peer_cache()
    key = f"{model.name.replace('/', '--')}-{fingerprint(model)[:16]}-{format}.gguf"
    if (path := cache.find(key)) is not None:
        return path
    with cache.writing(key) as path:
        if format in GGUF_DTYPES:
            write_gguf(model, path, format)
        else:
            source = path.with_suffix(".source")
            write_gguf(model, source, str(model.weights.dtype).removeprefix("torch."))
            _quantize(source, path, format)
    return cache.path(key)


def step_weight_bytes(path: Path) -> int:
    """Bytes of a file's weights that a decode step reads: all but the embedding, of which it takes one
    row; a tied one is read as LM head.
    """
    tensors = _tensors(path)
    embedding = tensors[GGUF_NAMES.embedding].bytes if GGUF_NAMES.lm_head in tensors else 0
    return sum(tensor.bytes for tensor in tensors.values()) - embedding


def mlp_weight_bytes(path: Path) -> int:
    """Those of the feed-forward layers among them."""
    matrices = tuple(GGUF_NAMES.layer[name].format(i="") for name in ("w_gate", "w_up", "w_down"))
    ends = tuple(name.removeprefix("blk.") for name in matrices)
    return sum(tensor.bytes for name, tensor in _tensors(path).items() if name.endswith(ends))


def bits_per_weight(path: Path) -> tuple[float, float]:
    """(of the layers' matrices, of all tensors), as `compressed_tensors.bits_per_weight` counts ours: without
    vocabulary and other metadata."""
    tensors = _tensors(path)
    matrices = [t for name, t in tensors.items() if name.startswith("blk.") and t.is_matrix]
    decoder, whole = (
        8 * sum(tensor.bytes for tensor in some) / sum(tensor.weights for tensor in some)
        for some in (matrices, tensors.values())
    )
    return decoder, whole


@dataclass(frozen=True, slots=True)
class _Tensor:
    bytes: int
    weights: int
    is_matrix: bool


@functools.cache  # reading the vocabulary takes seconds
def _tensors(path: Path) -> dict[str, _Tensor]:
    return {
        tensor.name: _Tensor(int(tensor.n_bytes), int(tensor.n_elements), len(tensor.shape) == 2)
        for tensor in GGUFReader(path).tensors
    }


def _quantize(source: Path, target: Path, format: str) -> None:
    api = llama_cpp()
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{format}")
    status = api.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(parameters))
    if status != 0:
        raise UnsupportedModel(
            f"llama.cpp cannot quantize this model to {format} (status {status})"
        )
