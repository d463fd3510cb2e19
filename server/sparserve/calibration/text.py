"""The text of a calibration, cut into windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparserve.bench.quality import Window, cut_windows
from sparserve.model.loader import LoadedModel
from sparserve.model.text import check_length, read_files, shares


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """One half to fit on, the other to measure with."""

    fitted: Sequence[Window]
    held_out: Sequence[Window]
    hash: str  # of the files' contents
    files: Sequence[str]  # `text_hash` of each


def read_text(
    model: LoadedModel,
    files: Sequence[Path],
    windows: int,
    prompt_tokens: int,
    decode_tokens: int,
    named: Sequence[str] = ("--windows", "--prompt-tokens", "--decode-tokens"),
) -> CalibrationText:
    """`windows` windows, from each file as many as its share of the tokens; every other one is held out. `named`:
    what errors call the three sizes.

    Raises ConfigError of files that cannot be read, or together are too short.
    """
    length = prompt_tokens + decode_tokens + 1
    check_length(model, length - 1, f"{named[1]} or {named[2]}")
    read = read_files(model, files)
    counts = shares(read, windows, length, f"{named[0]}, {named[1]} or {named[2]}")
    cut: list[Window] = []
    for ids, count in zip(read.token_ids, counts, strict=True):
        if count:
            cut += cut_windows(ids, count, prompt_tokens, decode_tokens)
    return CalibrationText(cut[::2], cut[1::2], read.hash, read.files)
