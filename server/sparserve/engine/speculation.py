"""Drafts of the next tokens, several of which one dense forward verifies.

A draft is a guess and nothing else. Every token of the output is drawn from the dense distribution of
its position, with that position's own random number, as without drafts; a right guess only means that
the same forward has the next distribution too. So drafts, whatever they are, never change the output:
neither of greedy decoding nor of a seeded draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sparserve.engine.logits import LogitAdjuster
from sparserve.sparsity.chooser import ChoicePlan
from sparserve.sparsity.policy import PolicyKind

MAX_NGRAM = 4
# A draft that nothing but the last token speaks for is mostly wrong: so many are tried then.
WEAK_DRAFTS = 1


class Ngrams:
    """Drafts what followed the text's last tokens where they stood before (prompt lookup).

    The longest end of the text counts, up to MAX_NGRAM tokens, in its latest other place. What follows
    there may run into the end itself; then the text is taken to repeat.
    """

    def __init__(self, prompt: Sequence[int], room: int) -> None:
        """`room`: tokens that the output has at most."""
        self._text = np.empty(len(prompt) + room, np.int32)
        self._text[: len(prompt)] = prompt
        self._prompt_len = len(prompt)
        self._length = len(prompt)

    def propose(self, output: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that may follow the prompt and `output`; [] where nothing matches."""
        known = self._length - self._prompt_len
        self._length += len(output) - known
        self._text[self._prompt_len + known : self._length] = output[known:]
        text = self._text[: self._length]
        after, matched = _after_latest_match(text)
        if not matched:
            return []
        if matched == 1:
            count = min(count, WEAK_DRAFTS)
        return [int(token) for token in np.resize(text[after:], count)]


def _after_latest_match(text: npt.NDArray[np.int32]) -> tuple[int, int]:
    """-> (where the text goes on after the latest other place of its longest end, that end's length)."""
    places = np.flatnonzero(text[:-1] == text[-1])
    after, matched = 0, 0
    while len(places) and matched < MAX_NGRAM:
        after, matched = int(places[-1]) + 1, matched + 1
        places = places[places >= matched]
        places = places[text[places - matched] == text[-1 - matched]]
    return after, matched


class Speculation:
    """The drafts of one choice, from the first guess to what came of them.

    Either n-grams draft, or the model itself with fewer neurons: then each draft is a step of its own, at a
    position whose KV the verification writes anew.
    """

    def __init__(
        self, prompt: Sequence[int], room: int, max_drafts: int, *, by_model: bool = False
    ) -> None:
        """`room`: tokens that the output has at most, all of them in the context."""
        self.drafts: list[int] = []  # of the tokens after the output's last one
        self.drafted_tokens = 0  # that were verified
        self.accepted_tokens = 0
        self.is_right = False  # what was drafted in the place of the output's last token
        self._ngrams = None if by_model else Ngrams(prompt, room)
        self._room = room
        self._max_drafts = max_drafts
        self._length = max_drafts  # that the next drafts have at most
        self._adjuster: LogitAdjuster | None = None
        self._is_over = False  # no more drafts before the next verification
        self._checked = 0  # of the drafts

    @classmethod
    def of(cls, plan: ChoicePlan, prompt: Sequence[int], room: int) -> Speculation | None:
        """Where the plan's policy is exact."""
        if plan.policy.kind is not PolicyKind.EXACT:
            return None
        assert plan.policy.draft_tokens is not None, "a plan has all that its policy left open"
        return cls(prompt, room, plan.policy.draft_tokens, by_model=plan.drafts is not None)

    def wants_step(self, output: Sequence[int]) -> bool:
        """The next step drafts a token."""
        return (
            self._ngrams is None
            and not self._is_over
            and len(self.drafts) < self._wanted(len(output))
        )

    def propose(self, output: Sequence[int]) -> list[int]:
        """The drafts to verify after `output`; the caller may shorten them."""
        if self._ngrams is not None:
            self.drafts = self._ngrams.propose(output, self._wanted(len(output)))
        return self.drafts

    def _wanted(self, generated: int) -> int:
        # The verification's own token comes on top.
        return min(self._length, self._room - generated - 1)

    def adjuster(self, own: LogitAdjuster) -> LogitAdjuster:
        """What adjusts the next draft's logits: the choice's `own` adjuster had it accepted the drafts."""
        if self._adjuster is None:
            self._adjuster = own.fork()
        return self._adjuster

    def end(self) -> None:
        """Nothing can be drafted after these."""
        self._is_over = True

    def drop(self) -> None:
        """These drafts are not verified: their KV is gone."""
        self.drafts, self._adjuster, self._is_over, self._checked = [], None, False, 0

    def check(self, token_id: int) -> None:
        """The output's next token is this one; those before it were as drafted."""
        if self._checked == 0:
            self.drafted_tokens += len(self.drafts)
        self.is_right = self.drafts[self._checked : self._checked + 1] == [token_id]
        self.accepted_tokens += self.is_right
        self._checked += 1

    def verified(self) -> None:
        """The last token checked was not drafted: of the next, more are after a success and fewer after a failure."""
        right = self._checked - 1
        if right < len(self.drafts):
            self._length = max(1, right)
        elif right == self._length:
            self._length = min(self._max_drafts, 2 * self._length)
        self.drop()
