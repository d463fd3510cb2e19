"""A tokenizer in GGUF's terms: the other way of `model/gguf_tokenizer.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer

from sparserve.errors import UnsupportedModel
from sparserve.model.config import ModelConfig
from sparserve.model.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer

# What tells pre-tokenizers apart: digits in groups, contractions, case, line ends, scripts, accents.
_SAMPLE = (
    "It's 3 10 2026 1234567 dollars, WE'LL see; don't THEY'RE camelCase HTMLParser snake_case.\n\n"
    "def f(x):\n\treturn x/2 + 3.5e-7  # a/b\r\n   end  \n 北京是首都。東京 서울 Путь в 100 000 नमस्ते ४२ "
    "e\u0301t\u00e9 \u00bd \u2167 \u3000\u00a0x 🙂🙃 ...!?\n/ ''' <|x|> a_b [1]/\n"
)


def vocabulary_fields(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """`tokenizer.ggml.*`. What a loader makes of them encodes text as `tokenizer` does.

    Raises UnsupportedModel where GGUF has no words for this tokenizer.
    """
    model = json.loads(tokenizer.to_str())["model"]
    common = _tokens(tokenizer, model, config.vocab_size) | _special_ids(tokenizer, config)
    merges = model.get("merges")
    if model["type"] == "BPE" and merges:
        kinds = _sentencepiece(common, model) if model["byte_fallback"] else _byte_level(model)
        for fields in kinds:
            if _reads_alike(build_tokenizer(common | fields), tokenizer):
                return common | fields
    raise UnsupportedModel(
        f"a {model['type']} tokenizer with {len(merges or ())} merges that cuts text as this one does "
        f"cannot be written to GGUF; known are {', '.join(PRE_TOKENIZERS)} and SentencePiece's BPE"
    )


def _tokens(tokenizer: Tokenizer, model: dict[str, Any], size: int) -> dict[str, Any]:
    """Rows of the embedding beyond the tokenizer's own are unused tokens."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for token, i in tokenizer.get_vocab(with_added_tokens=True).items():
        is_byte = model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        tokens[i], types[i] = token, TokenType.BYTE if is_byte else TokenType.NORMAL
    for i, added in tokenizer.get_added_tokens_decoder().items():
        types[i] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    if model.get("byte_fallback") and model.get("unk_token"):
        types[tokens.index(model["unk_token"])] = TokenType.UNKNOWN
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
    }


def _special_ids(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """BOS and the ends of a text, a turn and a message (no more), and which of them frame a text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a", add_special_tokens=True).ids
    at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    before, after = framed[:at], framed[at + len(bare) :]
    bos = before[0] if before else config.bos_token_id
    ends = list(dict.fromkeys([*after, *config.eos_token_ids]))
    fields: dict[str, Any] = {
        "tokenizer.ggml.add_bos_token": bool(before),
        "tokenizer.ggml.add_eos_token": bool(after),
    }
    if bos is not None:
        fields["tokenizer.ggml.bos_token_id"] = bos
    named = zip(("eos", "eot", "eom"), ends, strict=False)
    return fields | {f"tokenizer.ggml.{name}_token_id": token for name, token in named}


def _byte_level(model: dict[str, Any]) -> Iterator[dict[str, Any]]:
    merges = [" ".join(merge) for merge in model["merges"]]
    for name, pre in PRE_TOKENIZERS.items():
        if pre.ignore_merges == bool(model.get("ignore_merges")):
            yield {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": name,
                "tokenizer.ggml.merges": merges,
            }


def _sentencepiece(common: dict[str, Any], model: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A piece's score is the rank of the first merge that makes it; what no merge makes comes last."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(model["merges"]):
        ranks.setdefault(left + right, rank)
    last = len(model["merges"])
    scores = [-float(ranks.get(token, last)) for token in common["tokenizer.ggml.tokens"]]
    for prefix in (True, False):
        yield {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.add_space_prefix": prefix,
        }


def _reads_alike(ours: Tokenizer, theirs: Tokenizer) -> bool:
    return _cuts(ours) == _cuts(theirs) and ours.encode(_SAMPLE).ids == theirs.encode(_SAMPLE).ids


def _cuts(tokenizer: Tokenizer) -> list[str]:
    """The pieces that merges never cross, whether or not this vocabulary has merges that would."""
    text = tokenizer.normalizer.normalize_str(_SAMPLE) if tokenizer.normalizer else _SAMPLE
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
