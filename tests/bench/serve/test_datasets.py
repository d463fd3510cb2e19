"""Prompts have the lengths and the tokens that were asked for; files from anywhere are checked."""

import json

import numpy as np
import pytest

from sparserve.bench.serve import datasets
from sparserve.bench.serve.datasets import (
    Lengths,
    Vocabulary,
    as_texts,
    file_prompts,
    prefix_prompts,
    random_prompts,
    read_tokenizer,
)
from sparserve.errors import ConfigError


@pytest.fixture(scope="module")
def vocabulary(tiny_folder):
    return Vocabulary.of(read_tokenizer(tiny_folder), 259, 512)


def test_random_prompts_have_their_lengths_and_no_special_token(vocabulary):
    prompts = random_prompts(vocabulary, Lengths(40, 20, 0.5), seed=1)
    made = [prompts(number) for number in range(400)]
    inputs = [len(each.prompt) for each in made]
    outputs = [each.output_tokens for each in made]
    assert (min(inputs), max(inputs)) == (20, 60)
    assert (min(outputs), max(outputs)) == (10, 30)
    assert np.mean(inputs) == pytest.approx(40, abs=2)
    ids = {token for each in made for token in each.prompt}
    assert ids <= set(range(256)), "256 to 258 are special"
    assert len(ids) > 250
    assert made[7] == prompts(7)
    assert made[7] != random_prompts(vocabulary, Lengths(40, 20, 0.5), seed=2)(7)


def test_ids_beyond_the_model_or_its_tokenizer_are_not_sent(tiny_folder):
    tokenizer = read_tokenizer(tiny_folder)
    assert Vocabulary.of(tokenizer, 100).ids.max() == 99
    assert Vocabulary.of(tokenizer, 1000).ids.max() == 255


def test_prefixes_repeat_and_suffixes_do_not(vocabulary):
    prompts = prefix_prompts(vocabulary, 3, 32, 8, 5, seed=1)
    made = [prompts(number) for number in range(60)]
    assert {each.output_tokens for each in made} == {5}
    assert len({each.prompt[:32] for each in made}) == 3
    assert len({each.prompt[32:] for each in made}) == 60
    assert {len(each.prompt) for each in made} == {40}


def test_made_up_prompts_can_go_as_text(vocabulary):
    prompts = random_prompts(vocabulary, Lengths(12, 3), seed=1)
    text = as_texts(prompts, vocabulary.tokenizer)(5).prompt
    assert text == vocabulary.tokenizer.decode(list(prompts(5).prompt))


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        (Lengths(0, 5), "--input-len is 0"),
        (Lengths(5, 0), "--output-len is 0"),
        (Lengths(5, 5, 1.0), "--range-ratio"),
        (Lengths(500, 20), "exceed the model's context of 512"),
    ],
)
def test_lengths_that_cannot_be_are_refused(vocabulary, lengths, words):
    with pytest.raises(ConfigError, match=words):
        random_prompts(vocabulary, lengths, seed=0)


def test_paragraphs_are_prompts(tmp_path, vocabulary):
    path = tmp_path / "text"
    path.write_text("One\nline.\r\n\r\nTwo.\n\n\n\n  \n\n" + "x" * 600 + "\n")
    found = file_prompts("text", path, vocabulary, 9, seed=0)
    assert {prompt.prompt for prompt in found.prompts} == {"One\nline.", "Two."}
    assert found.left_out == 1, "the last is longer than the context"
    assert {found(n).prompt for n in (0, 1)} == {found(n).prompt for n in (2, 3)}
    assert len(file_prompts("text", path, None, 9, seed=0).prompts) == 3


def test_lines_are_prompts(tmp_path):
    path = tmp_path / "lines"
    path.write_text('{"prompt": "Hello", "output_tokens": 3}\n\n{"prompt": [1, 2]}\n')
    found = file_prompts("jsonl", path, None, None, seed=0)
    assert [(p.prompt, p.output_tokens) for p in found.prompts] == [("Hello", 3), ([1, 2], 64)]
    forced = file_prompts("jsonl", path, None, 7, seed=0)
    assert {p.output_tokens for p in forced.prompts} == {7}


def test_conversations_are_prompts_with_answers_of_a_length(tmp_path, vocabulary):
    def turns(*texts):
        return {"conversations": [{"from": "human", "value": text} for text in texts]}

    path = tmp_path / "chats.json"
    path.write_text(
        json.dumps([turns("A question", "An answer", "more"), turns("alone"), turns("A", "tiny")])
    )
    found = file_prompts("sharegpt", path, vocabulary, None, seed=0)
    assert [(p.prompt, p.output_tokens) for p in found.prompts] == [("A question", 9)]
    assert found.left_out == 2
    with pytest.raises(ConfigError, match="give --tokenizer"):
        file_prompts("sharegpt", path, None, None, seed=0)


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        ("jsonl", "{}", "line 1: it must be an object"),
        ("jsonl", '{"prompt": "a"}\nno', "line 2: no JSON"),
        ("jsonl", '{"prompt": [1, -2]}', "line 1: it must be"),
        ("jsonl", '{"prompt": [true]}', "line 1: it must be"),
        ("jsonl", '{"prompt": ""}', "line 1: it must be"),
        ("jsonl", '["prompt"]', "line 1: it must be"),
        ("jsonl", '{"prompt": "a", "output_tokens": 0}', "output_tokens is 0"),
        ("jsonl", '{"prompt": "a", "output_tokens": "9"}', "output_tokens is '9'"),
        ("jsonl", "[" * 100_000, "no JSON"),
        ("jsonl", "\n \n", "has no prompt"),
        ("sharegpt", "{", "is no JSON"),
        ("sharegpt", "{}", "must be a JSON list"),
        ("sharegpt", "[3]", "conversation 0"),
        ("sharegpt", '[{"conversations": [{"value": 3}, {}]}]', "conversation 0"),
        ("sharegpt", '[{"conversations": []}]', "has no prompt"),
        ("text", " \n\n ", "has no prompt"),
        ("text", b"\xff\xfe", "cannot be read as UTF-8"),
    ],
)
def test_damaged_files_are_refused_by_place(tmp_path, vocabulary, kind, content, words):
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=words):
        file_prompts(kind, path, vocabulary, None, seed=0)


def test_files_that_are_not_there_or_too_large_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="cannot be read"):
        file_prompts("text", tmp_path / "none", None, 3, seed=0)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        read_tokenizer(tmp_path)
    path = tmp_path / "large"
    path.write_text("four")
    monkeypatch.setattr(datasets, "MAX_FILE_BYTES", 3)
    with pytest.raises(ConfigError, match="has 4 bytes; at most 3"):
        file_prompts("text", path, None, 3, seed=0)
