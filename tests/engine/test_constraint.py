"""Texts that constraints let through, against plain checks of what they should be.

A walk draws tokens at random from those allowed, for a while; then it prefers those that end things.
"""

import asyncio
import json
import random
import re
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from sparserve.engine import grammar
from sparserve.engine.constraint import Constraint, ConstraintKind, Matcher
from sparserve.engine.grammar import ConstraintCompiler
from sparserve.errors import InvalidRequest
from sparserve.model.loader import LoadedModel

TINY_EOS = 257
CLOSING = '"}]),:a1.'


@pytest.fixture(scope="module")
def tiny(tiny_model: LoadedModel) -> Iterator[ConstraintCompiler]:
    """Over the 259 tokens of the tiny model, in an embedding of 300."""
    compiler = ConstraintCompiler(tiny_model.tokenizer, 300, [TINY_EOS])
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def demo(demo_model: LoadedModel) -> Iterator[ConstraintCompiler]:
    config = demo_model.config
    compiler = ConstraintCompiler(demo_model.tokenizer, config.vocab_size, config.eos_token_ids)
    yield compiler
    compiler.close()


def matcher_of(compiler: ConstraintCompiler, kind: str, source: str = "") -> Matcher:
    return asyncio.run(compiler.compile(Constraint(ConstraintKind(kind), source))).matcher()


def allowed_ids(matcher: Matcher) -> list[int]:
    mask = matcher.allowed()
    assert mask is not None
    return [int(i) for i in np.flatnonzero(mask[:, None] >> np.arange(32) & 1)]


def walk(matcher: Matcher, tokenizer: Tokenizer, seed: int, free_tokens: int = 12) -> list[int]:
    """Token ids until nothing but the end may follow, or the end was drawn."""
    chooser = random.Random(seed)
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    closing = [tokenizer.token_to_id(text) for text in CLOSING]
    drawn: list[int] = []
    while not matcher.is_finished:
        # Byte 0xED may begin a surrogate, which the grammars take for a character and Python doesn't.
        ids = [i for i in allowed_ids(matcher) if i != tokenizer.token_to_id("\u00ed")]
        ends = [i for i in ids if i in special]
        if len(drawn) < free_tokens:
            token_id = chooser.choice(ids)
        else:
            preferred = [i for i in closing if i in ids]
            token_id = ends[0] if ends else chooser.choice(preferred or ids)
        matcher.accept(token_id)
        drawn.append(token_id)
        assert len(drawn) < 2000
    return [i for i in drawn if i not in special]


def is_person(value: object) -> bool:
    return (
        isinstance(value, dict)
        and list(value) in (["name", "age"], ["name", "age", "tags"])
        and isinstance(value["name"], str)
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and all(tag in ("a", "b\n\u00e9") for tag in value.get("tags", []))
        and len(value.get("tags", [])) <= 3
    )


def is_list(value: object) -> bool:
    while value is not None:
        if not (isinstance(value, dict) and type(value["value"]) is int):
            return False
        value = value["next"]
    return True


SCHEMAS: list[tuple[object, Callable[[object], bool]]] = [
    (
        {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "tags": {"type": "array", "items": {"enum": ["a", "b\n\u00e9"]}, "maxItems": 3},
            },
            "required": ["name", "age"],
        },
        is_person,
    ),
    (
        {
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {
                        "value": {"type": "integer"},
                        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                    },
                    "required": ["value", "next"],
                }
            },
            "$ref": "#/$defs/node",
        },
        is_list,
    ),
    (
        {"type": "string", "pattern": r"^[^a]{1,3}\s?.\.(x|[ -~])$"},
        lambda v: isinstance(v, str) and re.fullmatch(r"[^a]{1,3}\s?.\.(x|[ -~])", v) is not None,
    ),
    (
        {"type": "string", "minLength": 2, "maxLength": 4},
        lambda v: isinstance(v, str) and 2 <= len(v) <= 4,
    ),
    (
        {"type": "string", "format": "date"},
        lambda v: isinstance(v, str) and re.fullmatch(r"\d{4}-[01]\d-[0-3]\d", v) is not None,
    ),
    (
        {"type": "number", "minimum": 1.5, "maximum": 3.25},
        lambda v: isinstance(v, int | float) and 1.5 <= v <= 3.25,
    ),
    ({"type": "array", "prefixItems": [{"const": {"k": [1]}}]}, lambda v: v in ([], [{"k": [1]}])),
    (
        {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "boolean"}}},
        lambda v: (
            isinstance(v, dict)
            and all(re.fullmatch("x[0-9]", k) and isinstance(b, bool) for k, b in v.items())
        ),
    ),
    (True, lambda v: True),
]


@pytest.mark.parametrize(("schema", "holds"), SCHEMAS)
@pytest.mark.parametrize("model", ["tiny", "demo"])
def test_texts_are_json_that_keeps_the_schema(
    schema: object,
    holds: Callable[[object], bool],
    model: str,
    request: pytest.FixtureRequest,
) -> None:
    compiler = request.getfixturevalue(model)
    tokenizer = request.getfixturevalue(f"{model}_model").tokenizer
    for seed in range(5):
        matcher = matcher_of(compiler, "json_schema", json.dumps(schema))
        text = tokenizer.decode(walk(matcher, tokenizer, seed))
        assert holds(json.loads(text)), text


@pytest.mark.parametrize("model", ["tiny", "demo"])
def test_a_json_object_is_any_object(model: str, request: pytest.FixtureRequest) -> None:
    compiler = request.getfixturevalue(model)
    tokenizer = request.getfixturevalue(f"{model}_model").tokenizer
    for seed in range(5):
        text = tokenizer.decode(walk(matcher_of(compiler, "json_object"), tokenizer, seed))
        assert isinstance(json.loads(text), dict)
    matcher = matcher_of(compiler, "json_object")
    for token_id in tokenizer.encode('{"a": [1, {"b": null}], "c": 1.5e3, "d": {}}').ids:
        matcher.accept(token_id)
    assert matcher.is_finished


REGEXES = [
    r"\d{4}-\d{2}-\d{2}",
    r"(cat|dogs?|\u00e9t\u00e9)*!",
    r"[^\w\s]{2,}\x41?",
    r"^(?:a|b+?){0,3}(?<name>c)$",
    r"a{130,131}|\\\.\[\]\{\}\"",
    r".{3}",
    "",
]


@pytest.mark.parametrize("pattern", REGEXES)
@pytest.mark.parametrize("model", ["tiny", "demo"])
def test_texts_match_the_whole_regex(
    pattern: str, model: str, request: pytest.FixtureRequest
) -> None:
    compiler = request.getfixturevalue(model)
    tokenizer = request.getfixturevalue(f"{model}_model").tokenizer
    same = pattern.replace("(?<", "(?P<")
    for seed in range(5):
        text = tokenizer.decode(walk(matcher_of(compiler, "regex", pattern), tokenizer, seed))
        assert re.fullmatch(same, text, re.ASCII | re.DOTALL), text


ATOMS = st.sampled_from([*"ab1 \u00e9", ".", r"\d", r"\w", "[ab]", "[^a]", r"\.", r"\n"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,2}"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(pattern=PATTERNS, seed=st.integers(0, 1000))
def test_random_regexes(
    tiny: ConstraintCompiler, tiny_model: LoadedModel, pattern: str, seed: int
) -> None:
    tokenizer, matcher = tiny_model.tokenizer, matcher_of(tiny, "regex", pattern)
    chooser, ids = random.Random(seed), list[int]()
    # The literals of the patterns, in GPT-2's alphabet; without them ".*b" would hardly ever end.
    literals = [tokenizer.token_to_id(char) for char in "ab1.\u0120\u010a\u00c3\u00a9"]
    while not matcher.is_finished and len(ids) < 100:
        allowed = allowed_ids(matcher)
        if TINY_EOS in allowed and chooser.random() < 0.3:
            break
        texts = [i for i in allowed if i not in (TINY_EOS, tokenizer.token_to_id("\u00ed"))]
        ids.append(chooser.choice([i for i in texts if i in literals] or texts))
        matcher.accept(ids[-1])
    assume(matcher.is_finished or TINY_EOS in allowed_ids(matcher))
    text = tokenizer.decode(ids)
    assert re.fullmatch(pattern, text, re.ASCII | re.DOTALL), text


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@settings(max_examples=40, deadline=None)
@given(options=st.lists(TEXTS, min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_choices_are_exact(tiny: ConstraintCompiler, options: list[str], seed: int) -> None:
    """At every step the bytes allowed are those that some option goes on with, no more, no fewer."""
    tiny_bytes = _tiny_bytes()
    options += [options[0] + "x", options[0]]  # a prefix and a repetition
    matcher, chooser = matcher_of(tiny, "choice", json.dumps(options)), random.Random(seed)
    written, encoded = b"", [option.encode() for option in options]
    while not matcher.is_finished:
        follow = {o[len(written)] for o in encoded if o.startswith(written) and o != written}
        end = {TINY_EOS} if written in encoded else set()
        assert set(allowed_ids(matcher)) == {tiny_bytes[byte] for byte in follow} | end
        if not follow or (end and chooser.random() < 0.5):
            break
        byte = chooser.choice(sorted(follow))
        matcher.accept(tiny_bytes[byte])
        written += bytes([byte])
    assert written in encoded


def _tiny_bytes() -> dict[int, int]:
    """Token id of each byte, from the byte-level alphabet as GPT-2 defined it."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = (byte for byte in range(256) if byte not in shown)
    char = {byte: chr(byte) for byte in shown} | dict(
        zip(hidden, map(chr, count(256)), strict=False)
    )
    ids = {c: i for i, c in enumerate(sorted(char.values()))}
    return {byte: ids[c] for byte, c in char.items()}


EXPRESSION = """
root ::= expression  # as in the documentation
expression ::= expression [+-] term | term
term ::= [0-9]{1,3} | "(" expression ")"
"""


def parse_expression(text: str, at: int = 0) -> int:
    """-> where the expression at `at` ends."""
    while True:
        if text[at] == "(":
            at = parse_expression(text, at + 1)
            assert text[at] == ")"
            at += 1
        else:
            digits = re.compile(r"\d{1,3}").match(text, at)
            assert digits is not None
            at = digits.end()
        if at == len(text) or text[at] not in "+-":
            return at
        at += 1


@pytest.mark.parametrize("model", ["tiny", "demo"])
def test_texts_follow_the_grammar(model: str, request: pytest.FixtureRequest) -> None:
    compiler = request.getfixturevalue(model)
    tokenizer = request.getfixturevalue(f"{model}_model").tokenizer
    for seed in range(8):
        text = tokenizer.decode(walk(matcher_of(compiler, "grammar", EXPRESSION), tokenizer, seed))
        assert parse_expression(text) == len(text)


def test_no_special_token_and_no_padding_is_ever_allowed(
    demo: ConstraintCompiler, demo_model: LoadedModel
) -> None:
    matcher = matcher_of(demo, "regex", ".*")
    special = {i for i, t in demo_model.tokenizer.get_added_tokens_decoder().items() if t.special}
    allowed = set(allowed_ids(matcher))
    assert special & allowed == set(demo_model.config.eos_token_ids)
    assert len(allowed) > 40_000


def test_ids_beyond_the_tokenizer_are_not_allowed(tiny: ConstraintCompiler) -> None:
    ids = allowed_ids(matcher_of(tiny, "regex", "(.|\\n)*"))
    assert max(ids) == TINY_EOS
    assert matcher_of(tiny, "regex", "a").allowed().shape == (10,)  # type: ignore[union-attr]


def test_a_grammar_cannot_name_a_special_token(tiny: ConstraintCompiler) -> None:
    for token_id in (256, 258, 299):
        with pytest.raises(InvalidRequest):
            matcher_of(tiny, "grammar", f"root ::= Token({token_id})").allowed()


def test_the_end_is_allowed_where_the_text_may_end(tiny: ConstraintCompiler) -> None:
    byte = _tiny_bytes()
    matcher = matcher_of(tiny, "regex", "ab?")
    assert allowed_ids(matcher) == [byte[ord("a")]]
    matcher.accept(byte[ord("a")])
    assert not matcher.is_finished
    assert allowed_ids(matcher) == [byte[ord("b")], TINY_EOS]
    matcher.accept(byte[ord("b")])
    assert matcher.is_finished
    assert allowed_ids(matcher) == [TINY_EOS]
    matcher.accept(TINY_EOS)
    assert matcher.is_finished


def test_matchers_of_one_constraint_are_independent(tiny: ConstraintCompiler) -> None:
    byte = _tiny_bytes()
    compiled = asyncio.run(tiny.compile(Constraint(ConstraintKind.REGEX, "ab")))
    first, second = compiled.matcher(), compiled.matcher()
    first.accept(byte[ord("a")])
    assert allowed_ids(first) == [byte[ord("b")]]
    assert allowed_ids(second) == [byte[ord("a")]]


def test_accepting_what_was_not_allowed_is_an_error(tiny: ConstraintCompiler) -> None:
    matcher = matcher_of(tiny, "regex", "a")
    with pytest.raises(ValueError, match="was not among those allowed"):
        matcher.accept(_tiny_bytes()[ord("b")])


def test_without_end_tokens_a_finished_text_says_so(tiny_model: LoadedModel) -> None:
    compiler = ConstraintCompiler(tiny_model.tokenizer, 259, [])
    try:
        matcher = matcher_of(compiler, "regex", "ab?")
        for char in "ab":
            assert not matcher.is_finished
            matcher.accept(_tiny_bytes()[ord(char)])
        assert matcher.is_finished
    finally:
        compiler.close()


def test_a_dead_end_ends_the_choice(tiny: ConstraintCompiler) -> None:
    matcher = matcher_of(tiny, "grammar", 'root ::= "a" x\nx ::= x "b"')
    (letter,) = allowed_ids(matcher)
    matcher.accept(letter)
    with pytest.raises(InvalidRequest, match="no token of this model can go on"):
        matcher.allowed()


def test_a_constraint_that_is_slow_to_follow_is_refused(demo: ConstraintCompiler) -> None:
    with pytest.raises(InvalidRequest, match=r"too slow to follow|takes more than"):
        matcher_of(demo, "regex", "(.{1,500}){1,20}")


def test_a_slow_token_ends_the_choice(
    tiny: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = matcher_of(tiny, "regex", "ab")
    monkeypatch.setattr(grammar, "MAX_STEP_SECONDS", -1.0)
    with pytest.raises(InvalidRequest, match="too slow to follow"):
        matcher.allowed()


def test_byte_fallback_vocabularies() -> None:
    """Pieces with spaces written as a low line, bytes as <0x..>: as Llama 2 has them."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "\u2581cat", "cat", "s", "\u00e9", "<", "0", "x"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    specials = ("<unk>", "<s>", "</s>")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    compiler = ConstraintCompiler(tokenizer, len(pieces), [2])
    try:
        pattern = "( cat|s|\u00e9|\u20ac|<0x41>){3,6}"
        used: set[int] = set()
        for seed in range(40):
            chooser, matcher, ids = random.Random(seed), matcher_of(compiler, "regex", pattern), []
            while not matcher.is_finished:
                ids.append(chooser.choice(allowed_ids(matcher)))
                matcher.accept(ids[-1])
            assert re.fullmatch(pattern, tokenizer.decode(ids))
            used.update(ids)
        assert {vocabulary[p] for p in ("\u2581cat", "\u2581", "<0xE2>", "s", "<")} <= used
    finally:
        compiler.close()


def test_the_mask_is_the_matchers_own(tiny: ConstraintCompiler) -> None:
    matcher = matcher_of(tiny, "regex", "ab")
    mask = matcher.allowed()
    assert mask is not None
    assert mask.dtype == np.int32
    before = mask.copy()
    matcher.accept(_tiny_bytes()[ord("a")])
    assert matcher.allowed() is mask
    assert not np.array_equal(mask, before)
