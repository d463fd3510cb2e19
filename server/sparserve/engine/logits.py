"""What a request asks to change about the model's logits before a token is drawn from them."""

from __future__ import annotations

import copy
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from sparserve.engine.constraint import Matcher
from sparserve.engine.request import GenerationRequest

Logits = npt.NDArray[np.float32]  # [vocab]
Mask = npt.NDArray[np.bool_]  # [vocab]


def refused_tokens(request: GenerationRequest, vocab_size: int) -> Mask | None:
    """All but the allowed tokens; None where all are allowed."""
    if not request.sampling.allowed_token_ids:
        return None
    refused = np.ones(vocab_size, dtype=np.bool_)
    refused[list(request.sampling.allowed_token_ids)] = False
    return refused


class LogitAdjuster:
    """Penalties, bias, minimum length, allowed tokens and constraint of one choice, in this order.

    Fed every token that is generated; only the engine thread touches it.
    """

    def __init__(
        self,
        request: GenerationRequest,
        vocab_size: int,
        eos_token_ids: Collection[int],
        refused: Mask | None = None,
    ) -> None:
        """`refused`: what `refused_tokens` made of the request; its choices share it."""
        self._sampling = request.sampling
        self._min_tokens = request.stopping.min_tokens
        self._generated = 0
        eos, ignore_eos = sorted(eos_token_ids), request.stopping.ignore_eos
        ending = {*request.stopping.stop_token_ids, *([] if ignore_eos else eos)}
        self._ending = np.array(sorted(ending), dtype=np.int64)
        # A constraint allows them wherever its text may end.
        self._ignored = np.array(eos if ignore_eos else [], dtype=np.int64)
        self._matcher: Matcher | None = None
        if request.constraint is not None:
            self._matcher = request.constraint.matcher()
        bias = dict(request.sampling.logit_bias)
        self._biased = np.array(list(bias), dtype=np.int64)
        self._bias = np.array(list(bias.values()), dtype=np.float32)
        self._refused = refused
        self._seen: Mask | None = None  # [vocab], in prompt or output
        if request.sampling.repetition_penalty != 1:
            self._seen = np.zeros(vocab_size, dtype=np.bool_)
            self._seen[list(request.prompt_token_ids)] = True
        self._counts: npt.NDArray[np.int32] | None = None  # [vocab], in the output
        if request.sampling.has_output_penalties:
            self._counts = np.zeros(vocab_size, dtype=np.int32)

    @property
    def is_finished(self) -> bool:
        """The constraint holds and nothing may follow."""
        return self._matcher is not None and self._matcher.is_finished

    @property
    def may_end(self) -> bool:
        """The minimum number of tokens is reached."""
        return self._generated >= self._min_tokens

    @property
    def is_idle(self) -> bool:
        """The next token is drawn from the model's own logits."""
        return (
            self._matcher is None
            and self._refused is None
            and not self._sampling.has_penalties
            and not len(self._biased)
            and (self.may_end or not len(self._ending))
        )

    def fork(self) -> LogitAdjuster:
        """One in the same state that goes on by itself. Raises nothing."""
        other = copy.copy(self)
        other._seen = None if self._seen is None else self._seen.copy()
        other._counts = None if self._counts is None else self._counts.copy()
        other._matcher = None if self._matcher is None else self._matcher.fork()
        return other

    def accept(self, token_id: int) -> None:
        """A token was generated."""
        self._generated += 1
        if self._seen is not None:
            self._seen[token_id] = True
        if self._counts is not None:
            self._counts[token_id] += 1
        if self._matcher is not None:
            self._matcher.accept(token_id)

    def adjust(self, logits: Logits) -> Logits:
        """The logits to draw the next token from; `logits` stay as they are."""
        out, sampling = logits.copy(), self._sampling
        if self._seen is not None:
            seen, penalty = out[self._seen], np.float32(sampling.repetition_penalty)
            out[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        if self._counts is not None:
            out -= np.float32(sampling.frequency_penalty) * self._counts
            out -= np.float32(sampling.presence_penalty) * (self._counts > 0)
        out[self._biased] += self._bias
        if not self.may_end:
            out[self._ending] = -np.inf
        if self._refused is not None:
            out[self._refused] = -np.inf
        allowed = None if self._matcher is None else self._matcher.allowed()
        if allowed is not None:
            bits = np.unpackbits(allowed.view(np.uint8), bitorder="little")
            out[bits[: len(out)] == 0] = -np.inf
            out[self._ignored] = -np.inf
        return out
