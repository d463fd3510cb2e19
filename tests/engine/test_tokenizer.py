"""TextTokenizer: special tokens once, tokens alone, and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from sparserve.engine.chat import Conversation
from sparserve.engine.tokenizer import TextTokenizer
from sparserve.errors import ChatUnavailable, InvalidRequest, PromptTooLong

HELLO = Conversation([{"role": "user", "content": "hi"}])
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def bytes_tokenizer(tiny_model) -> Tokenizer:
    """A copy of the tiny model's: every byte a token, 256 <bos>, 257 <eos>, 258 <pad>."""
    return Tokenizer.from_str(tiny_model.tokenizer.to_str())


def wrapped(tokenizer: Tokenizer, template: str | None = TEMPLATE) -> TextTokenizer:
    return TextTokenizer(tokenizer, template, 259, {"bos_token": 256, "eos_token": 257})


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_chat_has_the_one_bos_that_its_template_wrote(bytes_tokenizer, adds_bos):
    if adds_bos:
        bytes_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 256)]
        )
    tokenizer = wrapped(bytes_tokenizer)
    text = tokenizer.render_chat(HELLO)
    assert text == "<bos>hi"
    ids = tokenizer.encode_chat(text, 100)
    assert ids[0] == 256
    assert ids.count(256) == 1
    assert tokenizer.encode("hi", 100).count(256) == adds_bos  # a plain prompt gets the model's own


def test_without_a_template_there_is_no_chat(bytes_tokenizer):
    with pytest.raises(ChatUnavailable, match="no chat template"):
        wrapped(bytes_tokenizer, None).render_chat(HELLO)


def test_what_is_wrong_with_a_chat_is_blamed_on_its_messages(bytes_tokenizer):
    tokenizer = wrapped(bytes_tokenizer)
    with pytest.raises(PromptTooLong) as refused:
        tokenizer.encode_chat("x" * 1000, 10)
    assert refused.value.field == "messages"
    with pytest.raises(InvalidRequest) as refused:
        tokenizer.encode_chat("\ud800", 10)
    assert refused.value.field == "messages"


def test_special_tokens_are_in_a_decoded_text_when_asked_for(bytes_tokenizer):
    tokenizer = wrapped(bytes_tokenizer)
    ids = [256, *tokenizer.encode("hi", 10), 257]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<bos>hi<eos>"


@given(st.text(st.characters(exclude_categories=["Cs"], max_codepoint=127), max_size=30))
def test_the_texts_of_tokens_alone_join_to_the_text(tiny_model, text):
    tokenizer = wrapped(tiny_model.tokenizer)
    ids = tokenizer.encode(text, 1000)
    assert "".join(tokenizer.token_text(token_id) for token_id in ids) == text


def test_a_token_alone_shows_special_tokens_and_marks_parts_of_characters(bytes_tokenizer):
    tokenizer = wrapped(bytes_tokenizer)
    assert [tokenizer.token_text(i) for i in (256, 257, 258)] == ["<bos>", "<eos>", "<pad>"]
    first = tokenizer.encode("é", 10)[0]
    assert tokenizer.token_text(first) == "\N{REPLACEMENT CHARACTER}"


def test_a_token_alone_keeps_the_space_that_a_decoder_takes_off_a_text():
    bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "▁": 2, "▁b": 3}, [("▁", "b")]))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Metaspace()
    tokenizer = TextTokenizer(bpe, None, 4, {})
    assert bpe.decode([3]) == "b"
    assert [tokenizer.token_text(i) for i in range(4)] == ["a", "b", " ", " b"]
