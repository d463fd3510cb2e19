"""What a calibration has finished, kept beside its output, so that an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sparserve.errors import ConfigError
from sparserve.sparsity.index import save_whole

METADATA_KEY = "sparserve_calibration"

Tensors = dict[str, torch.Tensor]


class Stages:
    """Results of stages by their names, in a safetensors file at `path`.

    A file of other inputs, or one that cannot be read, counts as none.
    """

    def __init__(self, path: Path, inputs: Mapping[str, object]) -> None:
        """`inputs`: JSON values of all that results depend on."""
        self._path = path
        self._metadata = {METADATA_KEY: json.dumps(inputs, sort_keys=True)}
        self._kept = self._load()

    def run(self, stage: str, compute: Callable[[], Tensors]) -> Tensors:
        """The results of `stage`: kept ones, or those of `compute`. Raises ConfigError where they cannot be
        kept."""
        start = f"{stage}/"
        kept = {n.removeprefix(start): t for n, t in self._kept.items() if n.startswith(start)}
        if kept:
            return kept
        made = compute()
        self._kept |= {start + name: tensor for name, tensor in made.items()}
        try:
            save_whole(self._path, self._kept, self._metadata)
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be written: {error}") from error
        return made

    def forget(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)

    def _load(self) -> Tensors:
        try:
            with safe_open(self._path, framework="pt") as file:
                if file.metadata() != self._metadata:
                    return {}
                return {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (OSError, SafetensorError):
            return {}
