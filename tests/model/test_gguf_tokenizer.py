"""Tokenizers of GGUF files against plain implementations of what they stand for."""

import itertools
import json
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Tokenizer, Qwen2Tokenizer

from sparserve.model.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer

CORPUS = [
    "It's the first of 2026; we'll see 12345 things, can't we? THEY'RE sure.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n\n\n",
    "Der schnelle braune Fuchs springt über den faulen Hund. Ça va? Où est-ce?",
    "北京是中国的首都。東京は日本の首都です。서울은 대한민국의 수도이다.",
    "Путь в тысячу ли начинается с первого шага. 100 000 ₽ — много.",  # noqa: RUF001
    "HTMLParser camelCase snake_case https://example.org/a/b?c=1&d=2#e   \t  end  ",
    "🙂🙃 e\u0301 ﬁ ½ ² Ⅷ ४२ नमस्ते \u00a0 \u3000",
] * 2


def is_settled(character: str) -> bool:
    """The libraries compared know different versions of Unicode, and new characters differ in them."""
    category = unicodedata.category(character)
    return category != "Cn" and category == unicodedata.ucd_3_2_0.category(character)


TEXTS = st.lists(
    st.sampled_from(CORPUS).flatmap(
        lambda line: st.tuples(st.integers(0, len(line)), st.integers(0, 20)).map(
            lambda cut: line[cut[0] : sum(cut)]
        )
    )
    | st.text(st.characters(exclude_categories=["Cs", "Cn"]).filter(is_settled), max_size=6)
    | st.sampled_from(["\n", "\r\n", "  ", "'S", "'ll", "/", "9", "▁", "<|end|>", "'"]),
    max_size=8,
).map("".join)

# As llama.cpp's llama-vocab.cpp lists them.
LETTERS = r"\s?\p{L}+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
START = r"[^\r\n\p{L}\p{N}]?"
PATTERNS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "starcoder": [r"\p{N}", GPT2],
    "refact": [r"\p{N}", GPT2],
    "qwen2": [rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}"],
    "llama-bpe": [rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}"],
    "tekken": [
        rf"{START}{UPPER}*{LOWER}+|{START}{UPPER}+{LOWER}*|\p{{N}}|"
        + REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
    ],
    "deepseek-coder": [r"[\r\n]", LETTERS, r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
}


def cut(pieces: Sequence[str], pattern: str) -> list[str]:
    """Matches and what lies between them, each a piece of its own."""
    cuts = []
    for piece in pieces:
        bounds = [0]
        for match in regex.finditer(pattern, piece):
            bounds += match.span()
        cuts += [piece[a:b] for a, b in itertools.pairwise([*bounds, len(piece)]) if a < b]
    return cuts


def merged(parts: list[str], best: Callable[[str, str], float | None]) -> list[str]:
    """Join the leftmost pair of the lowest `best` until no pair has one."""
    while True:
        ranked = [(best(a, b), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        ranked = [(rank, i) for rank, i in ranked if rank is not None]
        if not ranked:
            return parts
        _, i = min(ranked)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


BYTE_CHARACTERS = ByteLevel(add_prefix_space=False, use_regex=False)


def plain_byte_level(text: str, pre: str, fields: dict[str, Any]) -> list[str]:
    tokens = set(fields["tokenizer.ggml.tokens"])
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(fields["tokenizer.ggml.merges"])}
    pieces = [unicodedata.normalize("NFC", text) if pre == "qwen2" else text]
    for pattern in PATTERNS[pre]:
        pieces = cut(pieces, pattern)
    out = []
    for piece in pieces:
        spelled = "".join(part for part, _ in BYTE_CHARACTERS.pre_tokenize_str(piece))
        if pre in ("llama-bpe", "tekken") and spelled in tokens:
            out.append(spelled)
        else:
            out += merged(list(spelled), lambda a, b: ranks.get((a, b)))
    return out


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    """GGUF fields of a vocabulary trained on words and on whole lines, whose tokens cross every cut
    that a pre-tokenizer makes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    words = [f" {word}" for line in CORPUS for word in line.split()]
    trained.train_from_iterator([*CORPUS, *words], trainer)
    vocabulary = trained.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    # A token that no merges make: only `ignore_merges` gives it.
    tokens += ["Ġunmergeable", "<|end|>", "<|begin|>"]
    merges = json.loads(trained.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 3],
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def test_every_pre_tokenizer_is_tested():
    assert PATTERNS.keys() == PRE_TOKENIZERS.keys()


@pytest.mark.parametrize("pre", PATTERNS)
def test_byte_level_bpe_equals_a_plain_one(byte_level, pre):
    tokenizer = build_tokenizer({**byte_level, "tokenizer.ggml.pre": pre})

    @given(TEXTS)
    @settings(max_examples=150, deadline=None)
    def holds(text: str) -> None:
        parts = text.split("<|end|>")
        expected = plain_byte_level(parts[0], pre, byte_level)
        for part in parts[1:]:
            expected += ["<|end|>", *plain_byte_level(part, pre, byte_level)]
        encoded = tokenizer.encode(text)
        assert encoded.tokens == expected
        decoded = tokenizer.decode(encoded.ids, skip_special_tokens=False)
        assert decoded == (unicodedata.normalize("NFC", text) if pre == "qwen2" else text)

    holds()
    for line in (*CORPUS, " unmergeable"):
        assert tokenizer.encode(line).tokens == plain_byte_level(line, pre, byte_level)


@pytest.mark.parametrize(("pre", "theirs"), [("gpt-2", GPT2Tokenizer), ("qwen2", Qwen2Tokenizer)])
def test_byte_level_bpe_equals_transformers(byte_level, pre, theirs):
    tokens = byte_level["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in byte_level["tokenizer.ggml.merges"]]
    reference = theirs(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = build_tokenizer({**byte_level, "tokenizer.ggml.pre": pre})

    @given(TEXTS.filter(lambda text: "<|" not in text))
    @settings(max_examples=150, deadline=None)
    def holds(text: str) -> None:
        assert tokenizer.encode(text).ids == reference(text)["input_ids"]

    holds()


# --- SentencePiece ---


def plain_sentencepiece(text: str, fields: dict[str, Any], prefix: bool = True) -> list[int]:
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens)}
    normal = {t: -scores[i] for t, i in ids.items() if fields["tokenizer.ggml.token_type"][i] == 1}
    spaced = (" " if prefix and text else "") + text
    out = []
    for piece in merged(list(spaced.replace(" ", "▁")), lambda a, b: normal.get(a + b)):
        out += [ids[piece]] if piece in normal else [ids[f"<0x{b:02X}>"] for b in piece.encode()]
    return out


@pytest.fixture(scope="module")
def sentencepiece() -> dict[str, Any]:
    """GGUF fields as llama.cpp's converter writes them for Llama 2: unknown, controls, bytes, then
    pieces in the order of their merging, characters last."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(
        CORPUS[:5], trainers.BpeTrainer(vocab_size=600, show_progress=False)
    )
    pieces = sorted(trained.get_vocab(), key=lambda piece: trained.token_to_id(piece))
    pieces = [p for p in pieces if len(p) > 1] + [p for p in pieces if len(p) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [0.0] * 259 + [float(-i) for i in range(len(pieces))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, "<|tool|>"],
        "tokenizer.ggml.scores": [*scores, 0.0],
        "tokenizer.ggml.token_type": [*kinds, 4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_bpe_equals_a_plain_one(sentencepiece, prefix):
    tokenizer = build_tokenizer({**sentencepiece, "tokenizer.ggml.add_space_prefix": prefix})

    @given(TEXTS)
    @settings(max_examples=200, deadline=None)
    def holds(text: str) -> None:
        ids = tokenizer.encode(text).ids
        assert ids == [1, *plain_sentencepiece(text, sentencepiece, prefix)]
        assert tokenizer.decode(ids) == text.replace("▁", " ")

    holds()
    for line in CORPUS:
        assert tokenizer.encode(line).ids[1:] == plain_sentencepiece(line, sentencepiece, prefix)


def test_sentencepiece_specials_are_cut_out_and_each_text_between_is_prefixed(sentencepiece):
    tokenizer = build_tokenizer(sentencepiece)
    tool = sentencepiece["tokenizer.ggml.tokens"].index("<|tool|>")
    plain = [plain_sentencepiece(text, sentencepiece) for text in ("the first", "of")]
    assert tokenizer.encode("the first</s>of<|tool|>").ids == [1, *plain[0], 2, *plain[1], tool]
    assert tokenizer.decode([1, *plain[0], 2, tool]) == "the first<|tool|>"


def test_bytes_that_are_no_piece_are_spelled(sentencepiece):
    tokenizer = build_tokenizer(sentencepiece)
    assert tokenizer.encode("\x01🙂").tokens[2:] == [
        "<0x01>",
        *(f"<0x{b:02X}>" for b in "🙂".encode()),
    ]


def test_lists_of_different_lengths_are_told(sentencepiece):
    with pytest.raises(ValueError, match="scores"):
        build_tokenizer({**sentencepiece, "tokenizer.ggml.scores": [0.0]})


# --- BOS and EOS ---


@pytest.mark.parametrize(
    ("pre", "fields", "framed"),
    [
        ("gpt-2", {}, False),
        ("qwen2", {}, False),
        ("llama-bpe", {}, True),
        ("tekken", {}, True),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, False),
        ("gpt-2", {"tokenizer.ggml.add_bos_token": True}, True),
        ("llama-bpe", {"tokenizer.ggml.bos_token_id": None}, False),
    ],
)
def test_bos_is_put_first_where_the_file_or_its_kind_says_so(byte_level, pre, fields, framed):
    base = {k: v for k, v in byte_level.items() if k != "tokenizer.ggml.add_bos_token"}
    tokens = build_tokenizer({**base, "tokenizer.ggml.pre": pre, **fields}).encode("x").tokens
    assert tokens == (["<|begin|>", "x"] if framed else ["x"])


def test_eos_is_put_last_where_the_file_says_so(byte_level):
    fields = {**byte_level, "tokenizer.ggml.add_eos_token": True}
    assert build_tokenizer(fields).encode("x").tokens == ["x", "<|end|>"]
