"""Hugging Face model folders: config.json, *.safetensors (sharded or not), tokenizer.json.

Only safetensors and JSON are ever read: no pickle, no code from the folder.
"""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from sparserve.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from sparserve.model.config import ModelConfig
from sparserve.model.fields import naming
from sparserve.model.weights import HF_NAMES

INDEX = "model.safetensors.index.json"
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class HuggingFaceFolder:
    """What stands beside the weights: config, tokenizer and chat template."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelNotFound, UnsupportedModel or CorruptCheckpoint."""
        self.folder = folder
        raw = read_json(folder / "config.json")
        if raw is None:
            raise ModelNotFound(
                f"{folder} has no config.json; a Hugging Face model folder needs one"
            )
        generation = read_json(folder / "generation_config.json") or {}
        with naming(folder / "config.json"):
            self.config = ModelConfig.from_hf(raw, generation)

    def tokenizer(self) -> Tokenizer:
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ModelNotFound(f"{path} is missing; the tokenizer is read from tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CorruptCheckpoint(f"{path} is not a tokenizer: {error}") from error
        # Left over from training in some files; a prompt is neither cut nor padded here.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def chat_template(self) -> str | None:
        jinja = self.folder / "chat_template.jinja"
        if jinja.is_file():
            return _read_text(jinja)
        template = (read_json(self.folder / "tokenizer_config.json") or {}).get("chat_template")
        if isinstance(template, list):  # several named templates
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None


class SafetensorsCheckpoint(HuggingFaceFolder):
    """One folder, opened lazily; tensors come memory-mapped, without a copy."""

    names = HF_NAMES
    rope_factors: torch.Tensor | None = None

    def __init__(self, folder: Path) -> None:
        """Raises ModelNotFound, UnsupportedModel or CorruptCheckpoint."""
        super().__init__(folder)
        self._where = self._index()

    def _index(self) -> dict[str, Any]:
        """Tensor name -> open file that holds it."""
        index = read_json(self.folder / INDEX)
        if index is not None:
            weight_map = index.get("weight_map")
            named = weight_map.values() if isinstance(weight_map, dict) else ()
            shards = set(map(str, named))
            # The index is untrusted: a shard is a plain name inside the folder.
            outside = [s for s in shards if Path(s).name != s or not s.endswith(".safetensors")]
            if outside or not shards:
                raise CorruptCheckpoint(
                    f"{self.folder / INDEX} names {reprlib.repr(outside) if outside else 'no shards'}; "
                    "expected *.safetensors files of the same folder"
                )
        else:
            shards = {"model.safetensors"}
        where: dict[str, Any] = {}
        for shard in sorted(shards):
            path = self.folder / shard
            try:
                if not path.is_file():
                    raise ModelNotFound(
                        f"{path} is missing; the model's weights must be safetensors"
                    )
                handle: Any = safe_open(path, framework="pt")
                where.update(dict.fromkeys(handle.keys(), handle))
            except (SafetensorError, OSError) as error:
                raise CorruptCheckpoint(f"{path} cannot be read as safetensors: {error}") from error
        return where

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._where)

    @property
    def native_dtype(self) -> torch.dtype:
        """The dtype of the embedding: what "auto" computes in."""
        return self.read(self.names.embedding).dtype

    def read(self, name: str) -> torch.Tensor:
        handle = self._where.get(name)
        if handle is None:
            raise CorruptCheckpoint(f"tensor {name} is missing from {self.folder}")
        try:
            tensor: torch.Tensor = handle.get_tensor(name)
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise CorruptCheckpoint(f"tensor {name} of {self.folder}: {error}") from error
        if tensor.dtype not in FLOAT_DTYPES:
            raise UnsupportedModel(
                f"tensor {name} is {tensor.dtype}; supported: {', '.join(map(str, FLOAT_DTYPES))}"
            )
        return tensor


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read as UTF-8 text: {error}") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, or None where there is no such file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path} holds a {type(value).__name__}, expected an object")
    return value
