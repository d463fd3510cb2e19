"""Texts from files."""

from __future__ import annotations

from pathlib import Path

from sparserve.errors import ConfigError
from sparserve.model.loader import LoadedModel
from sparserve.model.text import text_hash

TEXTS = "texts"  # in a calibrated index's source: `text_hash` of each file that it was made of


def read_text(path: Path) -> str:
    """Raises ConfigError where the file cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error


def tokens_of(model: LoadedModel, text: str) -> list[int]:
    """Without special tokens."""
    return list(model.tokenizer.encode(text, add_special_tokens=False).ids)


def refuse_calibration_text(path: Path, what: str, texts: object) -> None:
    """`texts`: hashes of those that `what` was calibrated on, where it says. Raises ConfigError of one of them."""
    if isinstance(texts, list | tuple) and text_hash(path.read_bytes()) in texts:
        raise ConfigError(
            f"the {what} was calibrated on {path}: it is fitted to this text; give one that it has not seen"
        )
