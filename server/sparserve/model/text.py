"""Texts that calibrations read, cut into windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from sparserve.errors import ConfigError
from sparserve.model.loader import LoadedModel


@dataclass(frozen=True, slots=True)
class TokenWindows:
    """What compression measures inputs on."""

    token_ids: torch.Tensor  # [windows, tokens]
    hash: str  # of the files' contents
    files: Sequence[str]  # `text_hash` of each


@dataclass(frozen=True, slots=True)
class TextFiles:
    """Whole, as tokens."""

    token_ids: Sequence[Sequence[int]]  # of each file, without special tokens
    hash: str  # of the files' contents
    files: Sequence[str]  # `text_hash` of each

    def fits(self, length: int) -> list[int]:
        """Windows of this length in each file."""
        return [len(ids) // length for ids in self.token_ids]


def read_windows(
    model: LoadedModel,
    files: Sequence[Path],
    windows: int,
    tokens: int,
    names: tuple[str, str] = ("calibration.windows", "calibration.tokens of the recipe"),
) -> TokenWindows:
    """`windows` windows, from each file as many as its share of the tokens, evenly spread over it. `names` are what
    errors call both numbers.

    Raises ConfigError of files that cannot be read, or together are too short.
    """
    check_length(model, tokens, names[1])
    read = read_files(model, files)
    counts = shares(read, windows, tokens, " or ".join(names))
    rows = []
    for ids, fits, count in zip(read.token_ids, read.fits(tokens), counts, strict=True):
        starts = (index * fits // count * tokens for index in range(count))
        rows += [ids[start : start + tokens] for start in starts]
    return TokenWindows(torch.tensor(rows), read.hash, read.files)


def read_files(model: LoadedModel, files: Sequence[Path]) -> TextFiles:
    """Raises ConfigError."""
    digest = hashlib.blake2b(digest_size=32)
    texts, hashes = [], []
    for path in files:
        content = _content(path)
        digest.update(hashlib.blake2b(content).digest())
        hashes.append(text_hash(content))
        text = content.decode("utf-8")
        texts.append(list(model.tokenizer.encode(text, add_special_tokens=False).ids))
    return TextFiles(texts, digest.hexdigest(), hashes)


def hashes_of(files: Sequence[Path]) -> list[str]:
    """`text_hash` of each. Raises ConfigError of one that cannot be read as text."""
    return [text_hash(_content(path)) for path in files]


def text_hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def check_length(model: LoadedModel, tokens: int, lower: str) -> None:
    """Raises ConfigError of windows beyond the model's context; `lower` names what makes them shorter."""
    limit = model.config.max_position_embeddings
    if tokens > limit:
        raise ConfigError(
            f"windows of {tokens} tokens exceed the context of {model.name}, {limit}; lower {lower}"
        )


def shares(read: TextFiles, windows: int, length: int, lower: str) -> list[int]:
    """Of `windows` windows of `length` tokens those that each file gives. Raises ConfigError of too short a
    text; `lower` names what makes do with less."""
    fits = read.fits(length)
    if sum(fits) < windows:
        raise ConfigError(
            f"the text has {sum(map(len, read.token_ids))} tokens, enough for {sum(fits)} windows of {length}; "
            f"{windows} were asked for: give more text, or lower {lower}"
        )
    # Shares of the whole are rounded so that all of them add up to `windows`.
    ends = [sum(fits[:n]) * windows // sum(fits) for n in range(len(fits) + 1)]
    return [after - before for before, after in pairwise(ends)]


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
    return content
