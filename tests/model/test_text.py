"""Windows of a text for compression: as many as asked for, from all files, none of them overlapping."""

import pytest

from sparserve.errors import ConfigError
from sparserve.model.text import read_windows


def write(folder, name: str, length: int, first: str):
    """A token is a byte."""
    path = folder / name
    path.write_text("".join(chr(ord(first) + i % 26) for i in range(length)), encoding="utf-8")
    return path


def test_windows_come_from_each_file_by_its_length(tiny_model, tmp_path):
    files = [write(tmp_path, "long", 3000, "a"), write(tmp_path, "short", 1000, "A")]
    found = read_windows(tiny_model, files, 8, 100)
    texts = [tiny_model.tokenizer.decode(row) for row in found.token_ids.tolist()]
    assert [text.islower() for text in texts] == [True] * 6 + [False] * 2
    whole = [path.read_text() for path in files]
    for number, text in enumerate(texts):
        own = whole[number >= 6]
        place = number - 6 * (number >= 6)
        assert text == own[500 * place : 500 * place + 100]
    assert len(set(found.files)) == 2


def test_too_short_or_too_long_is_told_with_the_way_out(tiny_model, tmp_path):
    file = write(tmp_path, "text", 1050, "a")
    assert read_windows(tiny_model, [file], 10, 100).token_ids.shape == (10, 100)
    with pytest.raises(
        ConfigError, match=r"1050 tokens, enough for 10 windows of 100; 11 were asked"
    ):
        read_windows(tiny_model, [file], 11, 100)
    with pytest.raises(ConfigError, match=r"exceed the context .* 512; lower calibration.tokens"):
        read_windows(tiny_model, [file], 1, 513)
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        read_windows(tiny_model, [tmp_path / "nowhere"], 1, 10)
