"""The text of a calibration, cut into windows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from sparserve.bench.quality import Window, cut_windows
from sparserve.bench.text import text_hash
from sparserve.errors import ConfigError
from sparserve.model.loader import LoadedModel


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """One half to fit on, the other to measure with."""

    fitted: Sequence[Window]
    held_out: Sequence[Window]
    hash: str  # of the files' contents
    files: Sequence[str]  # `text_hash` of each


@dataclass(frozen=True, slots=True)
class TokenWindows:
    """What compression measures inputs on."""

    token_ids: torch.Tensor  # [windows, tokens]
    hash: str  # of the files' contents
    files: Sequence[str]  # `text_hash` of each


def read_windows(
    model: LoadedModel, files: Sequence[Path], windows: int, tokens: int
) -> TokenWindows:
    """`windows` windows, from each file as many as its share of the tokens, evenly spread over it.

    Raises ConfigError of files that cannot be read, or together are too short.
    """
    _check_length(model, tokens, "calibration.tokens of the recipe")
    read = _read(model, files)
    shares = _shares(
        read, windows, tokens, "calibration.windows or calibration.tokens of the recipe"
    )
    rows = []
    for ids, fits, count in zip(read.token_ids, read.fits(tokens), shares, strict=True):
        starts = (index * fits // count * tokens for index in range(count))
        rows += [ids[start : start + tokens] for start in starts]
    return TokenWindows(torch.tensor(rows), read.hash, read.files)


def read_text(
    model: LoadedModel, files: Sequence[Path], windows: int, prompt_tokens: int, decode_tokens: int
) -> CalibrationText:
    """`windows` windows, from each file as many as its share of the tokens; every other one is held out.

    Raises ConfigError of files that cannot be read, or together are too short.
    """
    length = prompt_tokens + decode_tokens + 1
    _check_length(model, length - 1, "--prompt-tokens or --decode-tokens")
    read = _read(model, files)
    shares = _shares(read, windows, length, "--windows, --prompt-tokens or --decode-tokens")
    cut: list[Window] = []
    for ids, count in zip(read.token_ids, shares, strict=True):
        if count:
            cut += cut_windows(ids, count, prompt_tokens, decode_tokens)
    return CalibrationText(cut[::2], cut[1::2], read.hash, read.files)


@dataclass(frozen=True, slots=True)
class _Read:
    token_ids: Sequence[Sequence[int]]  # of each file
    hash: str
    files: Sequence[str]

    def fits(self, length: int) -> list[int]:
        """Windows of this length in each file."""
        return [len(ids) // length for ids in self.token_ids]


def _check_length(model: LoadedModel, tokens: int, lower: str) -> None:
    limit = model.config.max_position_embeddings
    if tokens > limit:
        raise ConfigError(
            f"windows of {tokens} tokens exceed the context of {model.name}, {limit}; lower {lower}"
        )


def _read(model: LoadedModel, files: Sequence[Path]) -> _Read:
    digest = hashlib.blake2b(digest_size=32)
    texts, hashes = [], []
    for path in files:
        try:
            content = path.read_bytes()
            text = content.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
        digest.update(hashlib.blake2b(content).digest())
        hashes.append(text_hash(content))
        texts.append(list(model.tokenizer.encode(text, add_special_tokens=False).ids))
    return _Read(texts, digest.hexdigest(), hashes)


def _shares(read: _Read, windows: int, length: int, lower: str) -> list[int]:
    """Of `windows` windows those that each file gives. Raises ConfigError."""
    fits = read.fits(length)
    if sum(fits) < windows:
        raise ConfigError(
            f"the text has {sum(map(len, read.token_ids))} tokens, enough for {sum(fits)} windows of {length}; "
            f"{windows} were asked for: give more text, or lower {lower}"
        )
    # Shares of the whole are rounded so that all of them add up to `windows`.
    ends = [sum(fits[:n]) * windows // sum(fits) for n in range(len(fits) + 1)]
    return [after - before for before, after in pairwise(ends)]
