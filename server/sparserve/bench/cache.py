"""Files that are dear to make again, kept in the user's cache up to a bound."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch

from sparserve.errors import ConfigError
from sparserve.model.catalog import cache_dir
from sparserve.model.loader import LoadedModel

EVALUATION_CACHE_BYTES = 4 << 30
PEER_CACHE_BYTES = 32 << 30
UNFINISHED = "unfinished-"
ABANDONED = 86400  # seconds after which an unfinished file belongs to a process that is gone


class FileCache:
    """A folder of files by their keys. Those used longest ago give way once it holds more than
    `limit` bytes; one file may be larger than that, and then is there alone.

    Several processes may use it at once: a file appears whole or not at all, and one that another
    process removes stays readable to whoever has it open.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit

    def path(self, key: str) -> Path:
        return self._folder / key

    def find(self, key: str) -> Path | None:
        """The file of `key`, which counts as used now; None where there is none."""
        path = self.path(key)
        try:
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        except OSError:
            return None
        return path

    @contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        """A path to write to, which becomes the file of `key` when the block ends without an error.

        Raises ConfigError where the folder cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=UNFINISHED) as scratch:
                unfinished = Path(scratch) / key
                yield unfinished
                unfinished.replace(self.path(key))
        except OSError as error:
            raise ConfigError(
                f"the cache {self._folder} cannot be written: {error}; set SPARSERVE_CACHE_DIR to "
                "another folder"
            ) from error
        self._evict(keep=key)

    def _evict(self, keep: str) -> None:
        found = []
        for entry in self._folder.iterdir():
            try:
                stat = entry.stat()
            except FileNotFoundError:  # another process removed it meanwhile
                continue
            if entry.is_file():
                found.append((entry.name == keep, stat.st_atime_ns, stat.st_size, entry))
            elif entry.name.startswith(UNFINISHED) and time.time() - stat.st_mtime > ABANDONED:
                shutil.rmtree(entry, ignore_errors=True)
        total = 0
        for kept, _, size, entry in sorted(found, reverse=True):  # the new one, then by last use
            total += size
            if total > self._limit and not kept:
                entry.unlink(missing_ok=True)


def evaluation_cache() -> FileCache:
    """Of originals: `$SPARSERVE_CACHE_DIR/eval`."""
    return FileCache(cache_dir() / "eval", EVALUATION_CACHE_BYTES)


def peer_cache() -> FileCache:
    """Of the files that peers load: `$SPARSERVE_CACHE_DIR/peers`."""
    return FileCache(cache_dir() / "peers", PEER_CACHE_BYTES)


def fingerprint(model: LoadedModel) -> str:
    """A hash of config, tokenizer and every weight, a second for 1 to 2 GB of them."""
    weights = model.weights
    digest = hashlib.sha256(f"{model.config} {model.tokenizer.to_str()}".encode())
    tensors = [weights.embedding, weights.norm, weights.lm_head, weights.rope_factors]
    for layer in weights.layers:
        tensors += [getattr(layer, field.name) for field in fields(layer)]
    for tensor in tensors:
        if tensor is not None:
            digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()
