"""Which windows are learned from, and which are held out."""

import logging

import pytest
import torch

from sparserve.compression.healing import Heal
from sparserve.healing.text import read_given, windows_of, write_text
from sparserve.model.text import TextFiles


def windows(held_out: int, generated: int) -> Heal:
    return Heal(window=16, held_out=held_out, generated=generated, batch=4, tokens=10**4)


def test_both_kinds_of_text_are_learned_from_and_held_out():
    given = TextFiles([list(range(40 * 16)), list(range(7))], "", ())
    how = Heal(window=16, held_out=8, generated=8, batch=4, tokens=10**4)
    written = torch.full((8, 16), -1)
    found = windows_of(how, given, written)
    assert (found.held_out[:, 0] == -1).sum() == 2  # a quarter of what was written
    assert len(found.held_out) == 8
    assert (found.training[:, 0] == -1).sum() == 6
    assert len(found.training) == 40


def test_each_text_gives_its_last_windows_by_its_share():
    texts = [[text] * 16 * 15 + [text + 100] * 16 * 5 for text in (1, 2, 3, 4)]
    given = TextFiles([*texts, [9] * 15], "", ())
    found = windows_of(windows(20, 0), given, torch.empty(0, 16, dtype=torch.int64))
    assert found.held_out[:, 0].tolist() == [101] * 5 + [102] * 5 + [103] * 5 + [104] * 5
    assert (found.training < 100).all()
    assert len(found.training) == 60


@pytest.mark.parametrize("read", [0, 1, 2, 3, 5, 9, 40])
@pytest.mark.parametrize("generated", [0, 1, 2, 3, 6, 7, 33])
def test_as_many_are_held_out_as_were_asked_for(read, generated):
    given = TextFiles([list(range(read * 16))], "", ())
    written = torch.full((generated, 16), -1)
    for held_out in range(1, (read + generated) // 4 + 1):
        found = windows_of(windows(held_out, generated), given, written)
        assert len(found.held_out) == held_out
        assert len(found.training) == read + generated - held_out


def test_a_text_that_is_given_twice_counts_once(model, text, few, tmp_path, caplog):
    again = tmp_path / "again.txt"
    again.write_bytes(text.read_bytes())
    once = read_given(model, few, [text])
    with caplog.at_level(logging.WARNING):
        twice = read_given(model, few, [text, again])
    assert twice.token_ids == once.token_ids
    assert twice.files == once.files
    assert "files used: 1 of 2" in caplog.text


def test_the_original_goes_on_after_text_that_is_trained_on(model, settings):
    how = windows(8, 16)
    given = TextFiles([[5] * 16 * 20 + [7] * 16 * 4, [5] * 15], "", ())
    written = write_text(model, settings, how, given, lambda done, total: None)
    assert (written[:, :12] == 5).all()
    assert (windows_of(how, given, written).held_out[:4] == 7).all()
