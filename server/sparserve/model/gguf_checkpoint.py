"""GGUF files: weights dequantized through the `gguf` package, tokenizer and chat template inside.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer

from sparserve.errors import CorruptCheckpoint, UnsupportedModel
from sparserve.model.config import FAMILIES, ModelConfig
from sparserve.model.fields import naming
from sparserve.model.gguf_tokenizer import build_tokenizer
from sparserve.model.weights import GGUF_NAMES

# What GGUFReader raises on damaged input; it validates little itself.
_READER_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError,
    OSError,
)  # fmt: skip


class _BoundedReader(GGUFReader):  # type: ignore[misc]  # gguf has no types
    """GGUFReader answers a read past the end with fewer items, so that a damaged length makes it
    loop for ever over nothing. Here such a read fails."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        items = super()._get(offset, dtype, count, override_order)
        if len(items) < count:
            raise ValueError(f"{count} items at byte {offset} reach past the end of the file")
        return items


class GGUFCheckpoint:
    """One GGUF file; F32, F16 and BF16 tensors come memory-mapped, quantized ones are dequantized when read."""

    names = GGUF_NAMES

    def __init__(self, path: Path) -> None:
        """Raises UnsupportedModel or CorruptCheckpoint."""
        self.path = path
        try:
            with path.open("rb") as file:
                if file.read(4) != b"GGUF":
                    raise CorruptCheckpoint(f"{path} does not start with the GGUF magic")
            # "c": private copy-on-write pages, which torch accepts as writable without copying.
            with np.errstate(over="raise"):  # offsets are added as 64-bit integers
                reader = _BoundedReader(path, "c")
            self.fields: dict[str, Any] = {k: f.contents() for k, f in reader.fields.items()}
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        except _READER_ERRORS as error:
            raise CorruptCheckpoint(f"{path} is damaged or truncated: {error}") from error
        with naming(path):
            self.config = ModelConfig.from_gguf(self.fields, self.tensor_names)

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    @property
    def native_dtype(self) -> torch.dtype:
        """ "auto": quantized and F32 files compute in float32, F16 and BF16 files in theirs."""
        tensor = self._tensors.get(self.names.layer["wq"].format(i=0))
        kinds = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
        return kinds.get(tensor.tensor_type, torch.float32) if tensor else torch.float32

    @property
    def rope_factors(self) -> torch.Tensor | None:
        """llama3 RoPE scaling as GGUF stores it: divisors of the frequencies, [head_dim / 2]."""
        if "rope_freqs.weight" not in self._tensors:
            return None
        factors = self._dequantized("rope_freqs.weight").float()
        expected = self.config.head_dim // 2
        if factors.shape != (expected,) or not bool((factors > 0).all()):
            raise CorruptCheckpoint(f"rope_freqs.weight must hold {expected} positive factors")
        return factors

    def read(self, name: str) -> torch.Tensor:
        tensor = self._dequantized(name)
        if not FAMILIES[self.config.architecture].gguf_interleaved:
            return tensor
        if name.endswith(("attn_q.weight", "attn_q.bias")):
            return _unpermute(name, tensor, self.config.num_heads)
        if name.endswith(("attn_k.weight", "attn_k.bias")):
            return _unpermute(name, tensor, self.config.num_kv_heads)
        return tensor

    def _dequantized(self, name: str) -> torch.Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CorruptCheckpoint(f"tensor {name} is missing from {self.path}")
        kind = tensor.tensor_type
        try:
            if kind == GGMLQuantizationType.BF16:
                return torch.from_numpy(tensor.data.view(np.int16)).view(torch.bfloat16)
            if kind == GGMLQuantizationType.F16:
                return torch.from_numpy(tensor.data)
            return torch.from_numpy(dequantize(tensor.data, kind))
        except NotImplementedError as error:
            raise UnsupportedModel(
                f"tensor {name} has type {kind.name}, which the gguf package cannot dequantize; take a "
                "file of another type, such as Q8_0, Q4_K or F16"
            ) from error
        except _READER_ERRORS as error:
            raise CorruptCheckpoint(f"tensor {name} of {self.path} is damaged: {error}") from error

    def tokenizer(self) -> Tokenizer:
        try:
            return build_tokenizer(self.fields)
        except KeyError as error:
            raise CorruptCheckpoint(f"{self.path} has no {error.args[0]!r}") from error
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise CorruptCheckpoint(
                f"the tokenizer inside {self.path} is damaged: {error}"
            ) from error

    def chat_template(self) -> str | None:
        template = self.fields.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None


def _unpermute(name: str, weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q/k [heads * head_dim, ...]: llama.cpp interleaves the two halves of each head."""
    if weight.shape[0] % (2 * heads):
        raise CorruptCheckpoint(
            f"tensor {name} of shape {list(weight.shape)} has no {heads} heads of even size"
        )
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
