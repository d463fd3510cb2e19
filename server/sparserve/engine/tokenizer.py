"""Text to token ids, and chat messages to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from sparserve.engine.detokenizer import Detokenizer
from sparserve.errors import InvalidRequest, PromptTooLong, UnsupportedModel


class TextTokenizer:
    """A model's tokenizer with the limits of the engine; safe to use from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: str | None,
        vocab_size: int,
        special_tokens: Mapping[str, int | None],
    ) -> None:
        """`special_tokens`: what templates may name ("bos_token", "eos_token") -> token id."""
        self._tokenizer = tokenizer
        self._special_tokens = {
            name: tokenizer.id_to_token(token_id) if token_id is not None else ""
            for name, token_id in special_tokens.items()
        }
        self.chat_template = chat_template
        self.vocab_size = vocab_size
        self._longest_token = max((len(t.encode()) for t in tokenizer.get_vocab()), default=1)

    def encode(self, text: str, max_tokens: int) -> tuple[int, ...]:
        """Token ids of a prompt. Raises PromptTooLong without tokenizing a hopeless text, and
        InvalidRequest on lone surrogates, which no UTF-8 text has.
        """
        if len(text) > max_tokens * self._longest_token:
            raise PromptTooLong(
                "text",
                f"the prompt has {len(text)} characters; no prompt that long has "
                f"{max_tokens} tokens or fewer, the limit here",
                max_tokens,
            )
        try:
            return tuple(self._tokenizer.encode(text).ids)
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequest("text", "the prompt is not valid UTF-8 text") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids)))

    def detokenizer(
        self, stop: Sequence[str], *, include_stop: bool, skip_special_tokens: bool
    ) -> Detokenizer:
        return Detokenizer(
            self._tokenizer,
            stop,
            include_stop=include_stop,
            skip_special_tokens=skip_special_tokens,
        )

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that asks the model to answer `messages` ({"role", "content"} each).

        The template comes with the model, so it runs in jinja2's sandbox. Raises UnsupportedModel
        where there is none or it fails.
        """
        if self.chat_template is None:
            raise UnsupportedModel("this model carries no chat template; send a plain prompt")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            template = environment.from_string(self.chat_template)
            return template.render(
                messages=list(messages),
                add_generation_prompt=True,
                raise_exception=_raise_exception,
                **self._special_tokens,
            )
        except Exception as error:  # it is a program of the model's authors: anything can happen
            raise UnsupportedModel(f"the model's chat template failed: {error}") from error


def _raise_exception(message: str) -> None:
    """What templates call to refuse messages."""
    raise TemplateError(message)
