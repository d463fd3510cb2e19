"""Text to token ids and back, within the limits of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer

from sparserve.engine.chat import ChatTemplate, Conversation
from sparserve.engine.detokenizer import Detokenizer
from sparserve.errors import ChatUnavailable, InvalidRequest, PromptTooLong


class TextTokenizer:
    """A model's tokenizer and chat template; safe to use from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: str | None,
        vocab_size: int,
        special_tokens: Mapping[str, int | None],
    ) -> None:
        """`special_tokens`: what templates may name ("bos_token", "eos_token") -> token id."""
        self.tokenizer = tokenizer
        self.special_tokens: dict[str, str] = {
            name: (tokenizer.id_to_token(token_id) or "") if token_id is not None else ""
            for name, token_id in special_tokens.items()
        }
        self.chat_template = chat_template
        self._chat = chat_template and ChatTemplate(chat_template, self.special_tokens)
        self.vocab_size = vocab_size
        self._longest_token = max((len(t.encode()) for t in tokenizer.get_vocab()), default=1)
        # Some decoders take the space off a text's first word, so a token is decoded after another.
        self._before = self.tokenizer.encode("a", add_special_tokens=False).ids
        self._token_texts: dict[int, str] = {}

    def encode(
        self, text: str, max_tokens: int, *, field: str = "text", add_special_tokens: bool = True
    ) -> tuple[int, ...]:
        """Token ids of a prompt; `field` is blamed for what is wrong with it.

        `add_special_tokens` adds what the model's post-processor puts around a text (<bos>). Raises
        PromptTooLong without tokenizing a hopeless text, and InvalidRequest on lone surrogates,
        which no UTF-8 text has.
        """
        if len(text) > max_tokens * self._longest_token:
            raise PromptTooLong(
                field,
                f"the prompt has {len(text)} characters; no prompt that long has "
                f"{max_tokens} tokens or fewer, the limit here",
                max_tokens,
            )
        try:
            encoding = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequest(field, "the prompt is not valid UTF-8 text") from error
        return tuple(encoding.ids)

    def encode_chat(self, text: str, max_tokens: int) -> tuple[int, ...]:
        """Token ids of what `render_chat` made: the template wrote <bos>, so no second one is added."""
        return self.encode(text, max_tokens, field="messages", add_special_tokens=False)

    def render_chat(self, conversation: Conversation) -> str:
        """Raises ChatUnavailable or InvalidRequest; see ChatTemplate.render."""
        if not self._chat:
            raise ChatUnavailable(
                "this model carries no chat template; send a plain prompt with Generate"
            )
        return self._chat.render(conversation)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """A token alone, special ones too; U+FFFD stands for bytes that are no whole character."""
        text = self._token_texts.get(token_id)
        if text is None:
            known = self.decode(self._before, skip_special_tokens=False)
            both = self.decode([*self._before, token_id], skip_special_tokens=False)
            text = self._token_texts[token_id] = both[len(known) :]
        return text

    def detokenizer(
        self,
        stop: Sequence[str],
        *,
        before: Sequence[int],
        include_stop: bool,
        skip_special_tokens: bool,
    ) -> Detokenizer:
        return Detokenizer(
            self.tokenizer,
            stop,
            before=before,
            include_stop=include_stop,
            skip_special_tokens=skip_special_tokens,
        )

    def to_json(self) -> str:
        """The content of a tokenizer.json; takes up to a second."""
        return str(self.tokenizer.to_str(pretty=False))
