"""Models that are compressed when they are loaded, and kept for the next time."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sparserve import __version__
from sparserve.compression.recipe import NONE, Recipe, read_pruning
from sparserve.config import EngineSettings
from sparserve.errors import ConfigError
from sparserve.model.catalog import DownloadProgress, cache_dir
from sparserve.model.compress_folder import compress_folder, require_text
from sparserve.model.compressed_checkpoint import VERSION, is_compressed
from sparserve.model.compressed_writer import COPIED, refuse_rounded
from sparserve.model.identity import hash_of_files
from sparserve.model.loader import find_model, open_checkpoint
from sparserve.model.text import hashes_of

log = logging.getLogger(__name__)


def compressed_folder(settings: EngineSettings, on_progress: DownloadProgress) -> tuple[str, Path]:
    """-> (the name to serve `settings.model` under, the folder with it compressed as `settings` say).

    Raises ModelError or ConfigError as `compress_folder`.
    """
    recipe, texts = _recipe_of(settings), settings.compress_texts
    require_text(recipe, texts)
    name, path = find_model(settings.model, on_progress)
    refuse_rounded(path)
    open_checkpoint(path)  # what is no model is told as such

    def compress(out: Path) -> Path:
        log.info("compressing %s by the recipe %s to %s", name, recipe.name, out)
        compress_folder(
            settings.model,
            recipe,
            texts,
            out,
            on_layer=lambda done, total: on_progress("compressing layers", done, total),
            on_prune=lambda done, total: on_progress("pruning layers", done, total),
            on_choice=lambda done, total: on_progress("choosing formats", done, total),
            on_download=on_progress,
        )
        return out

    if not settings.compress_cache:
        return name, compress(_temporary() / "model")
    out = (
        cache_dir() / "compressed" / f"{Path(name).name}-{recipe.name}-{_key(path, recipe, texts)}"
    )
    with _alone_with(out):
        return name, out if is_compressed(out) else compress(out)


def _recipe_of(settings: EngineSettings) -> Recipe:
    """Raises ConfigError."""
    shares = settings.prune, settings.prune_heads, settings.prune_mlp
    ratio, heads, mlp = (share or None for share in shares)
    return read_pruning(settings.compress or NONE, ratio=ratio, heads=heads, mlp=mlp)


def _key(path: Path, recipe: Recipe, texts: Sequence[Path]) -> str:
    """Of all that the compressed model depends on. Reads the checkpoint once: a second for a GB or so."""
    content = {
        "recipe": recipe.model_dump(mode="json"),
        "texts": hashes_of(texts) if recipe.needs_text else [],
        "sparserve": [__version__, VERSION],
    }
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16)
    try:
        digest.update(hash_of_files(path).encode())
        for file in (path / name for name in COPIED):  # of a GGUF file all is in it
            own = file.read_bytes() if file.is_file() else b""
            digest.update(hashlib.blake2b(own).digest())
    except OSError as error:
        raise ConfigError(f"the files of {path} cannot be read: {error}") from error
    return digest.hexdigest()


@contextmanager
def _alone_with(out: Path) -> Iterator[None]:
    """No other process compresses to `out` meanwhile: it waits, and then finds it whole."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = out.with_name(f"{out.name}.lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"the cache {out.parent} cannot be written: {error}; set SPARSERVE_CACHE_DIR to another folder, "
            "or take --no-compress-cache"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process uses %s: waiting for it", out)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # the lock is given up with the file, or by the system with the process


def _temporary() -> Path:
    """A folder that is removed when the process ends: layers are read from it until then."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="sparserve-"))
    except OSError as error:
        raise ConfigError(f"no temporary folder can be made: {error}; set TMPDIR") from error
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
