"""Models of the Hugging Face hub that this machine's cache already holds. Nothing is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from sparserve.errors import ModelNotFound

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")


def cached_model(model: str) -> Path | None:
    """The folder or GGUF file of a hub id `org/name` or `org/name@revision`; None for other text.

    Raises ModelNotFound where the id is not in the cache, or where it has no safetensors and not
    exactly one GGUF file.
    """
    match = _HUB_ID.fullmatch(model)
    if match is None:
        return None
    try:
        snapshot = Path(
            snapshot_download(match["repo"], revision=match["revision"], local_files_only=True)
        )
    except HFValidationError:
        return None
    except LocalEntryNotFoundError as error:
        revision = f" --revision {match['revision']}" if match["revision"] else ""
        raise ModelNotFound(
            f"no folder or file {model!r} here, and no such model in the Hugging Face cache "
            f"{constants.HF_HUB_CACHE}; `hf download {match['repo']}{revision}` puts it there"
        ) from error
    ggufs = sorted(snapshot.glob("*.gguf"))
    if any(snapshot.glob("*.safetensors")) or not ggufs:
        return snapshot
    if len(ggufs) > 1:
        names = ", ".join(path.name for path in ggufs)
        raise ModelNotFound(
            f"{model} has {len(ggufs)} GGUF files in the cache; name one by its path in {snapshot}: "
            f"{names}"
        )
    return ggufs[0]
