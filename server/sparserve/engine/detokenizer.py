"""Token ids to text, as it may leave the server: whole characters, no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
# Invalid bytes in a row that are waited for, in tokens; bounds the work on a stream of nothing else.
_MAX_UNFINISHED_TOKENS = 64
# Of a prompt: enough for its last word or character.
_CONTEXT_TOKENS = 5


class Detokenizer:
    """Text of one sequence, fed token by token.

    Text that could still become a stop string is held back; `flush` releases it at the end. Bytes of
    an unfinished character are never released: a text cut inside one ends before it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        before: Sequence[int] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        """`before`: the prompt, whose end decides about a first space; `include_stop`: the text ends with
        the stop string instead of before it.
        """
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # The last tokens: those before `_read` are context (decoders treat the first word and word
        # pieces by their neighbours), their text is out already.
        self._window = list(before[-_CONTEXT_TOKENS:])
        self._read = len(self._window)
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""

    def push(self, token_id: int, *, may_stop: bool = True) -> tuple[str, str | None]:
        """-> (text to send now, the stop string that ends it or None).

        Without `may_stop` a stop string is text like any other.
        """
        self._held += self._decode_next(token_id)
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found and may_stop:
            at, stop = min(found, key=lambda match: match[0])
            text, self._held = self._held[: at + len(stop) * self._include_stop], ""
            return text, stop
        keep = self._possible_stop_length()
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text, None

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        text, self._held = self._held, ""
        return text

    def _decode_next(self, token_id: int) -> str:
        """Text that `token_id` completes; none while it may be inside a character."""
        self._window.append(token_id)
        text = self._decode(self._window)
        known = self._decode(self._window[: self._read])
        if text == known:  # a special token
            self._window.pop()
            return ""
        upto = len(self._window)
        if text.endswith(_REPLACEMENT) and upto - self._read <= _MAX_UNFINISHED_TOKENS:
            upto, text = self._before_the_unfinished(text)
            if upto <= self._read:
                return ""
        self._window, self._read = self._window[self._read :], upto - self._read
        return text[len(known) :]

    def _before_the_unfinished(self, text: str) -> tuple[int, str]:
        """-> (tokens of the window whose text no later token can change, that text).

        The replacement character at the end of `text` may stand for the beginning of a character or
        for bytes that nothing completes. Where both sides of a cut decode to the whole, no character
        lies across it.
        """
        for upto in range(len(self._window) - 1, self._read, -1):
            head = self._decode(self._window[:upto])
            tail = self._decode(self._window[upto:])
            if tail and head + tail == text:  # a special token decodes to nothing
                return upto, head
        return self._read, ""

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, self._skip_special_tokens))

    def _possible_stop_length(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=0)
        for length in range(min(longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
