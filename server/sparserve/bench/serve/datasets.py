"""What requests ask: prompts that were made up, or that a file has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from sparserve.errors import ConfigError

Kind = Literal["random", "prefix", "sharegpt", "text", "jsonl"]
MAX_FILE_BYTES = 2 << 30
INPUT_TOKENS, OUTPUT_TOKENS = 128, 64  # where nobody says otherwise
MAX_LENGTH = 1 << 20  # tokens of a prompt or an answer
STAGE_PROMPTS = (
    1_000_000  # numbers of prompts kept apart for each stage, so that none is asked twice
)
APART = (
    5**0.5 - 1
) / 2  # of a file, between the beginnings of stages: its multiples are spread evenly over it
LEAST_TOKENS = 4  # of a prompt and its answer in a ShareGPT file; shorter ones are left out


@dataclass(frozen=True, slots=True)
class Prompt:
    prompt: str | Sequence[int]  # text or token ids
    output_tokens: int


# The prompt of a number. The same number always gives the same one; there is no last number.
Prompts = Callable[[int], Prompt]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of random prompts and answers, uniform within `range_ratio` of the middle."""

    input: int = INPUT_TOKENS
    output: int = OUTPUT_TOKENS
    range_ratio: float = 0.0

    def check(self) -> None:
        """Raises ConfigError."""
        check_lengths({"--input-len": self.input, "--output-len": self.output})
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(f"--range-ratio is {self.range_ratio:g}; it must be in [0, 1)")

    def longest(self) -> int:
        return sum(int(length * (1 + self.range_ratio)) for length in (self.input, self.output))

    def draw(self, source: np.random.Generator) -> tuple[int, int]:
        """(of the prompt, of the answer)"""
        low, high = 1 - self.range_ratio, 1 + self.range_ratio
        found = [
            int(source.integers(max(1, int(length * low)), int(length * high), endpoint=True))
            for length in (self.input, self.output)
        ]
        return found[0], found[1]


def check_lengths(flags: dict[str, int]) -> None:
    """Raises ConfigError."""
    for flag, value in flags.items():
        if not 1 <= value <= MAX_LENGTH:
            raise ConfigError(f"{flag} is {value}; it must be from 1 to {MAX_LENGTH}")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of the model that answers."""

    ids: npt.NDArray[np.int64]  # that random prompts are made of: no special ones
    tokenizer: Tokenizer
    max_context: int | None  # prompt and answer; None: not known

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, size: int | None = None, max_context: int | None = None
    ) -> Vocabulary:
        """`size`: of the model's; ids beyond either are not sent."""
        known = tokenizer.get_vocab_size(with_added_tokens=True)
        special = [i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special]
        ids = np.setdiff1d(np.arange(known if size is None else min(size, known)), special)
        return cls(ids, tokenizer, max_context)

    def random(self, source: np.random.Generator, count: int) -> tuple[int, ...]:
        return tuple(source.choice(self.ids, count).tolist())

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text).ids)


def read_tokenizer(path: Path) -> Tokenizer:
    """Of a folder with tokenizer.json, or of that file. Raises ConfigError."""
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(
            f"--tokenizer {file} cannot be read as a tokenizer.json: {error}"
        ) from error


def random_prompts(vocabulary: Vocabulary, lengths: Lengths, seed: int) -> Prompts:
    """Raises ConfigError where they would not fit the context."""
    lengths.check()
    _check_context(vocabulary, lengths.longest(), "--input-len, --output-len or --range-ratio")

    def make(number: int) -> Prompt:
        source = np.random.default_rng((seed, number))
        prompt, output = lengths.draw(source)
        return Prompt(vocabulary.random(source, prompt), output)

    return make


def prefix_prompts(
    vocabulary: Vocabulary, prefixes: int, prefix: int, suffix: int, output: int, seed: int
) -> Prompts:
    """Every prompt begins with one of a few prefixes, which a prefix cache may know. Raises ConfigError."""
    check_lengths(
        {"--num-prefixes": prefixes, "--prefix-len": prefix, "--suffix-len": suffix, "--output-len": output}
    )  # fmt: skip
    _check_context(
        vocabulary, prefix + suffix + output, "--prefix-len, --suffix-len or --output-len"
    )
    begins = [
        vocabulary.random(np.random.default_rng((seed, 0, index)), prefix)
        for index in range(prefixes)
    ]

    def make(number: int) -> Prompt:
        source = np.random.default_rng((seed, 1, number))
        begin = begins[int(source.integers(prefixes))]
        return Prompt(begin + vocabulary.random(source, suffix), output)

    return make


def as_texts(prompts: Prompts, tokenizer: Tokenizer) -> Prompts:
    """The same as text, for servers that take no token ids; a tokenizer may read it as a few tokens more or less."""

    def make(number: int) -> Prompt:
        made = prompts(number)
        if isinstance(made.prompt, str):
            return made
        return Prompt(tokenizer.decode(list(made.prompt)), made.output_tokens)

    return make


@dataclass(frozen=True, slots=True)
class FilePrompts:
    """Prompts of a file in an order of the seed's, and from the first again after the last. Stages begin far apart."""

    prompts: Sequence[Prompt]
    left_out: int  # that are too short, or longer than the context
    order: npt.NDArray[np.int64]

    def __call__(self, number: int) -> Prompt:
        stage, place = divmod(number, STAGE_PROMPTS)
        begin = int(stage * APART * len(self.order))
        return self.prompts[int(self.order[(begin + place) % len(self.order)])]


def file_prompts(
    kind: Kind, path: Path, vocabulary: Vocabulary | None, output: int | None, seed: int
) -> FilePrompts:
    """`output`: tokens of each answer; None: what the file says. Prompts that do not fit the context are left out, where
    `vocabulary` knows it. Raises ConfigError.
    """
    if output is not None:
        check_lengths({"--output-len": output})
    reader = {"sharegpt": _sharegpt, "text": _paragraphs, "jsonl": _lines}[kind]
    found = list(reader(path, _read(path), vocabulary, output))
    kept = [prompt for prompt in found if prompt is not None and _fits(prompt, vocabulary)]
    if not kept:
        raise ConfigError(f"{path} has no prompt that can be sent; {len(found)} were left out")
    order = np.random.default_rng((seed, len(kept))).permutation(len(kept))
    return FilePrompts(kept, len(found) - len(kept), order)


def _check_context(vocabulary: Vocabulary, longest: int, flags: str) -> None:
    if vocabulary.max_context is not None and longest > vocabulary.max_context:
        raise ConfigError(
            f"{longest} tokens of prompt and answer exceed the model's context of {vocabulary.max_context}; lower {flags}"
        )


def _fits(prompt: Prompt, vocabulary: Vocabulary | None) -> bool:
    if vocabulary is None or vocabulary.max_context is None:
        return True
    text = prompt.prompt
    length = vocabulary.count(text) if isinstance(text, str) else len(text)
    return length + prompt.output_tokens <= vocabulary.max_context


def _read(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise ConfigError(f"{path} has {size} bytes; at most {MAX_FILE_BYTES} are read")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _paragraphs(
    path: Path, text: str, vocabulary: Vocabulary | None, output: int | None
) -> Iterator[Prompt | None]:
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        if stripped := paragraph.strip():
            yield Prompt(stripped, output or OUTPUT_TOKENS)


def _lines(
    path: Path, text: str, vocabulary: Vocabulary | None, output: int | None
) -> Iterator[Prompt | None]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _line(f"{path}, line {number}", line, output)


def _line(where: str, line: str, output: int | None) -> Prompt:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: no JSON: {error}") from error
    prompt = found.get("prompt") if isinstance(found, dict) else None
    ids = isinstance(prompt, list) and all(type(i) is int and 0 <= i < 2**31 for i in prompt)
    if not prompt or not (isinstance(prompt, str) or ids):
        raise ConfigError(
            f'{where}: it must be an object such as {{"prompt": "Hello", "output_tokens": 32}}, whose prompt is a text or '
            "a list of token ids"
        )
    length = found.get("output_tokens") if output is None else output
    if length is None:
        length = OUTPUT_TOKENS
    if type(length) is not int or not 1 <= length <= MAX_LENGTH:
        raise ConfigError(
            f"{where}: output_tokens is {length!r}; it must be a whole number from 1 to {MAX_LENGTH}"
        )
    return Prompt(prompt, length)


def _sharegpt(
    path: Path, text: str, vocabulary: Vocabulary | None, output: int | None
) -> Iterator[Prompt | None]:
    """The first two turns of each conversation: a prompt, and an answer whose length is asked for."""
    if vocabulary is None:
        raise ConfigError("a ShareGPT file has answers to be counted in tokens; give --tokenizer")
    try:
        conversations = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(conversations, list):
        raise ConfigError(f"{path} must be a JSON list of conversations")
    for number, conversation in enumerate(conversations):
        turns = _turns(f"{path}, conversation {number}", conversation)
        if len(turns) < 2:
            yield None
            continue
        length = vocabulary.count(turns[1])
        enough = min(length, vocabulary.count(turns[0])) >= LEAST_TOKENS
        yield Prompt(turns[0], output or min(length, MAX_LENGTH)) if enough else None


def _turns(where: str, conversation: Any) -> list[str]:
    """Of its first two turns. Raises ConfigError."""
    turns = conversation.get("conversations") if isinstance(conversation, dict) else None
    if isinstance(turns, list):
        values = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) == len(values):
            return texts
    raise ConfigError(
        f'{where}: it must be an object such as {{"conversations": [{{"from": "human", "value": "Hello"}}, …]}}'
    )
