"""The text of a calibration, cut into windows: one half to fit on, the other to measure with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparserve.bench.quality import Window, cut_windows
from sparserve.bench.text import text_hash
from sparserve.errors import ConfigError
from sparserve.model.loader import LoadedModel


@dataclass(frozen=True, slots=True)
class CalibrationText:
    fitted: Sequence[Window]
    held_out: Sequence[Window]
    hash: str  # of the files' contents
    files: Sequence[str]  # `text_hash` of each


def read_text(
    model: LoadedModel, files: Sequence[Path], windows: int, prompt_tokens: int, decode_tokens: int
) -> CalibrationText:
    """`windows` windows, from each file as many as its share of the tokens; every other one is held out.

    Raises ConfigError of files that cannot be read, or together are too short.
    """
    length = prompt_tokens + decode_tokens + 1
    limit = model.config.max_position_embeddings
    if length - 1 > limit:
        raise ConfigError(
            f"windows of {length - 1} tokens exceed the context of {model.name}, {limit}; lower "
            "--prompt-tokens or --decode-tokens"
        )
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
    fits = [len(ids) // length for ids in texts]
    if sum(fits) < windows:
        raise ConfigError(
            f"the text has {sum(map(len, texts))} tokens, enough for {sum(fits)} windows of {length}; "
            f"{windows} were asked for: give more text, or lower --windows, --prompt-tokens or "
            "--decode-tokens"
        )
    cut: list[Window] = []
    for number, ids in enumerate(texts):
        # Shares of the whole are rounded so that all of them add up to `windows`.
        before, after = (sum(fits[:n]) * windows // sum(fits) for n in (number, number + 1))
        if after > before:
            cut += cut_windows(ids, after - before, prompt_tokens, decode_tokens)
    return CalibrationText(cut[::2], cut[1::2], digest.hexdigest(), hashes)
