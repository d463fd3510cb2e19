"""The tokenizer inside a GGUF file, as a `tokenizers.Tokenizer`.

GGUF holds the vocabulary and names the rest: how text is cut before BPE (`tokenizer.ggml.pre`), and
the kind of each token. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from sparserve.errors import UnsupportedModel

# llama.cpp's LLAMA_TOKEN_TYPE_*
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

# The patterns of the models' own tokenizer.json.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",  # CJK
    r"\p{N}",
)


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """What `tokenizer.ggml.pre` stands for: how text is cut before byte-level BPE."""

    patterns: Sequence[str] = ()  # each cuts the pieces of those before; a match is a piece
    gpt2_pattern: bool = False  # then GPT-2's own
    normalizer: Callable[[], Any] | None = None
    ignore_merges: bool = False  # a piece that is a token is not merged from its bytes
    add_bos: bool = False  # where the file does not say


_DIGITS = (r"\p{N}",)
PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(gpt2_pattern=True),
    "smollm": _PreTokenizer(_DIGITS, gpt2_pattern=True),
    "starcoder": _PreTokenizer(_DIGITS, gpt2_pattern=True),
    "refact": _PreTokenizer(_DIGITS, gpt2_pattern=True),
    "qwen2": _PreTokenizer((_QWEN2,), normalizer=normalizers.NFC),
    "llama-bpe": _PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    "tekken": _PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "deepseek-coder": _PreTokenizer(_DEEPSEEK_CODER, add_bos=True),
}


def build_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Raises UnsupportedModel; KeyError, ValueError, TypeError, IndexError or AttributeError where
    the metadata is damaged.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind == "llama":
        tokenizer, add_bos = _sentencepiece(fields), True
    elif kind == "gpt2" and pre in PRE_TOKENIZERS:
        tokenizer, add_bos = _byte_level(fields, PRE_TOKENIZERS[pre]), PRE_TOKENIZERS[pre].add_bos
    else:
        raise UnsupportedModel(
            f"the GGUF tokenizer {reprlib.repr(kind)} with pre-tokenizer {reprlib.repr(pre)} is not "
            f"supported; supported: 'llama', and 'gpt2' with {', '.join(PRE_TOKENIZERS)}. Use the "
            "model's Hugging Face folder instead"
        )
    _add_special_tokens(tokenizer, fields)
    _frame(tokenizer, fields, add_bos)
    return tokenizer


def _byte_level(fields: dict[str, Any], pre: _PreTokenizer) -> Tokenizer:
    """GPT-2's byte-level BPE by a list of merges."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(_bpe(vocabulary, merges, ignore_merges=pre.ignore_merges))
    cuts: list[Any] = [pre_tokenizers.Split(Regex(p), "isolated") for p in pre.patterns]
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.gpt2_pattern))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    if pre.normalizer is not None:
        tokenizer.normalizer = pre.normalizer()
    return tokenizer


def _sentencepiece(fields: dict[str, Any]) -> Tokenizer:
    """SentencePiece's BPE, which merges the neighbours that make the piece of the highest score, and
    spells what has no piece by bytes. Spaces are "▁"; one is put before each text.
    """
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    scores: list[float] = fields["tokenizer.ggml.scores"]
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    if not len(tokens) == len(scores) == len(kinds):
        raise ValueError(f"{len(tokens)} tokens, {len(scores)} scores, {len(kinds)} token types")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = next((tokens[i] for i, kind in enumerate(kinds) if kind == _UNKNOWN), None)
    model = _bpe(
        vocabulary,
        _merges_by_score(vocabulary, scores, kinds),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), spaces] if prefix else [spaces]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges_by_score(
    vocabulary: dict[str, int], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best score first. Text is never merged into control
    or user-defined tokens, which are cut out of it before, nor into those that stand for bytes."""
    normal = {token: i for token, i in vocabulary.items() if kinds[i] == 1}
    ways = [
        (-scores[i], i, token[:at], token[at:])
        for token, i in normal.items()
        for at in range(1, len(token))
        if token[:at] in normal and token[at:] in normal
    ]
    return [(left, right) for _, _, left, right in sorted(ways)]


def _bpe(vocabulary: dict[str, int], merges: Any, **options: Any) -> Any:
    try:
        return models.BPE(vocabulary, merges, **options)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(str(error)) from error


def _add_special_tokens(tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields.get("tokenizer.ggml.token_type") or []
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(tokens[i], special=special, normalized=False)
            for i, k in enumerate(kinds)
            if k == wanted
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)


def _frame(tokenizer: Tokenizer, fields: dict[str, Any], add_bos: bool) -> None:
    """Have the tokenizer put BOS before and EOS after a text, where the file or its kind says so."""
    tokens = fields["tokenizer.ggml.tokens"]
    frame = []
    for name, default in (("bos", add_bos), ("eos", False)):
        token_id = fields.get(f"tokenizer.ggml.{name}_token_id")
        wanted = fields.get(f"tokenizer.ggml.add_{name}_token", default) and token_id is not None
        frame.append((tokens[token_id], token_id) if wanted else None)
    bos, eos = frame
    if bos or eos:
        parts = [*([bos[0]] if bos else []), "$A", *([eos[0]] if eos else [])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=parts, special_tokens=[entry for entry in frame if entry]
        )
