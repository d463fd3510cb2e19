"""Text that leaves the server: whole characters, no part of a stop string."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from sparserve.engine.detokenizer import Detokenizer
from sparserve.model.loader import LoadedModel

# Of the byte-level alphabet: bytes that begin characters of 2, 3 and 4 bytes, and that continue them.
_PARTS_OF_CHARACTERS = [127, 156, 157, 169, 171, 172, 176, 94, 95, 222, 250]


@pytest.fixture(scope="module")
def bytes_tokenizer(tiny_model: LoadedModel) -> Tokenizer:
    return tiny_model.tokenizer


def feed(
    tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()
) -> tuple[list[str], str | None]:
    detokenizer, pieces = Detokenizer(tokenizer, stop), []
    for token_id in ids:
        text, matched = detokenizer.push(token_id)
        pieces.append(text)
        if matched is not None:
            return pieces, matched
    return [*pieces, detokenizer.flush()], None


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_pieces_join_to_the_text(bytes_tokenizer, text):
    pieces, _ = feed(bytes_tokenizer, bytes_tokenizer.encode(text).ids)
    assert "".join(pieces) == text


def test_a_character_of_several_tokens_comes_whole(bytes_tokenizer):
    ids = bytes_tokenizer.encode("a🎉é").ids
    assert len(ids) == 7
    pieces, _ = feed(bytes_tokenizer, ids)
    assert [p for p in pieces if p] == ["a", "🎉", "é"]


def test_an_unfinished_character_is_left_out(bytes_tokenizer):
    pieces, _ = feed(bytes_tokenizer, bytes_tokenizer.encode("ab🎉").ids[:-1])
    assert "".join(pieces) == "ab"


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab\n", max_size=24),
    stop=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_earliest_stop_string(bytes_tokenizer, text, stop):
    pieces, matched = feed(bytes_tokenizer, bytes_tokenizer.encode(text).ids, tuple(stop))
    sent = "".join(pieces)
    # The plain definition: the stop string that is complete first, fed character by character.
    for end in range(1, len(text) + 1):
        found = [(text[:end].find(s), s) for s in stop if s in text[:end]]
        if found:
            assert matched in stop
            assert sent == text[: min(found)[0]]
            return
    assert matched is None
    assert sent == text


def test_text_that_may_become_a_stop_string_waits(bytes_tokenizer):
    detokenizer = Detokenizer(bytes_tokenizer, ("STOP",))
    sent = [detokenizer.push(i)[0] for i in bytes_tokenizer.encode("xSTxSTO").ids]
    assert sent == ["x", "", "", "STx", "", "", ""]
    assert detokenizer.flush() == "STO"


def test_special_tokens_have_no_text(bytes_tokenizer):
    pieces, _ = feed(bytes_tokenizer, [256, *bytes_tokenizer.encode("hi").ids, 257])
    assert "".join(pieces) == "hi"


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 258) | st.sampled_from(_PARTS_OF_CHARACTERS), max_size=30))
@example(ids=[172, 94, 94, 156, 94, 0])
@example(ids=[126, 256, 94])
def test_any_tokens_give_the_text_of_decoding_them_together(bytes_tokenizer, ids):
    pieces, _ = feed(bytes_tokenizer, ids)
    whole = bytes_tokenizer.decode(ids)
    sent = "".join(pieces)
    assert whole.startswith(sent)
    # Only the bytes of one unfinished character may be missing.
    assert set(whole[len(sent) :]) <= {"\N{REPLACEMENT CHARACTER}"}
    assert len(whole) - len(sent) <= 3


def test_invalid_bytes_of_a_byte_fallback_tokenizer_do_not_fail():
    vocab = {"<unk>": 0, "▁hi": 1, "there": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    ids = [1, 3 + 0x0A, 3 + 0xFF, 2, 1, *[3 + b for b in "é".encode()], 3 + 0xE2, 1]
    pieces, _ = feed(tokenizer, ids)
    # That decoder spoils a whole run of bytes for one bad byte, after the good ones are out already.
    words = "".join(pieces).replace("\N{REPLACEMENT CHARACTER}", "")
    assert words == "hi\nthere hié hi"


def words_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "▁": 1, "▁hi": 2, "▁there": 3, "1": 4}, []))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("before", "ids", "text"),
    [((2,), [3], " there"), ((2, 2), [1, 4, 3], " 1 there"), ((), [2, 3], "hi there")],
)
def test_the_first_space_depends_on_the_prompt(before, ids, text):
    detokenizer = Detokenizer(words_tokenizer(), before=before)
    assert "".join(detokenizer.push(i)[0] for i in ids) + detokenizer.flush() == text


def test_the_prompt_is_not_searched_for_stop_strings(bytes_tokenizer):
    prompt = bytes_tokenizer.encode("END").ids
    detokenizer = Detokenizer(bytes_tokenizer, ("END", "D!"), before=prompt)
    assert [detokenizer.push(i) for i in bytes_tokenizer.encode("!x").ids] == [
        ("!", None),
        ("x", None),
    ]
