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

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.chat_template = chat_template
        self.vocab_size = vocab_size
        self._longest_token = max((len(t.encode()) for t in tokenizer.get_vocab()), default=1)

    def encode(self, text: str, max_tokens: int) -> tuple[int, ...]:
        """Token ids of a prompt. Raises PromptTooLong without tokenizing a hopeless text."""
        if len(text) > max_tokens * self._longest_token:
            raise PromptTooLong(
                "text",
                f"the prompt has {len(text)} characters; no prompt that long has "
                f"{max_tokens} tokens or fewer, the limit here",
                max_tokens,
            )
        return tuple(self._tokenizer.encode(text).ids)

    def check(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Raises InvalidRequest where an id is outside the vocabulary."""
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"token_ids.ids[{index}]",
                    f"token id {token_id} is outside the vocabulary of {self.vocab_size}",
                )
        return tuple(token_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids)))

    def detokenizer(self, stop: Sequence[str]) -> Detokenizer:
        return Detokenizer(self._tokenizer, stop)

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
            return template.render(messages=list(messages), add_generation_prompt=True)
        except TemplateError as error:
            raise UnsupportedModel(f"the model's chat template failed: {error}") from error
