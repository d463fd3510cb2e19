"""What tells one model from another, so that an index made for one is not used with another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from sparserve.model.compressed_checkpoint import INFO, LAYERS, Source, is_compressed
from sparserve.model.loader import LoadedModel
from sparserve.sparsity.index import IndexKey


def index_key(model: LoadedModel, format: str) -> IndexKey:
    """Of `model` with weights in `format` (BackendInfo.dtype). Reads the checkpoint once: a second for a
    GB or so. Raises OSError."""
    config = model.config
    return IndexKey(
        model.name,
        hash_of_files(model.path),
        hash_of_tokenizer(model),
        format,
        config.num_layers,
        config.intermediate_size,
        config.hidden_size,
    )


def hash_of_tokenizer(model: LoadedModel) -> str:
    return hashlib.blake2b(model.tokenizer.to_str().encode(), digest_size=32).hexdigest()


def hash_of_files(path: Path) -> str:
    """BLAKE2b over the names and contents of what a checkpoint's weights are read from. Raises OSError."""
    digest = hashlib.blake2b(digest_size=32)
    for file in _files(path):
        # A single file may be renamed.
        name = file.relative_to(path).as_posix().encode() if path.is_dir() else b""
        digest.update(len(name).to_bytes(8, "little") + name)
        with file.open("rb") as content:
            inner = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=32))
        digest.update(inner.digest())
    return digest.hexdigest()


def source_has_changed(folder: Path, source: Source) -> bool:
    """Whether what the compressed model in `folder` was made of is there, and another model by now.

    Reads it only where a file of it is younger than the folder, for that takes a second for a GB or so.
    """
    origin = Path(source.path)  # from outside: it may be a pipe, or no path at all
    try:
        if not (origin.is_dir() or origin.is_file()):
            return False
        made = (folder / INFO).stat().st_mtime
        younger = any(file.stat().st_mtime > made for file in _files(origin))
        return younger and hash_of_files(origin) != source.hash
    except OSError:  # it is gone, which changes nothing
        return False


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield path / "config.json"
        yield from sorted(path.glob("*.safetensors"))
        if is_compressed(path):
            yield path / INFO
            yield from sorted(path.glob(f"{LAYERS}/*.safetensors"))
    else:
        yield path
