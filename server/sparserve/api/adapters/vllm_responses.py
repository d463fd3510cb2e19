"""What the engine tells of a request, as `vllm.grpc.engine.GenerateResponse`: token ids, no text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparserve.api.adapters.vllm_stubs import vllm_engine_pb2 as pb
from sparserve.api.responses import note_in_log
from sparserve.engine.request import (
    FinishReason,
    GeneratedToken,
    GenerationRequest,
    PromptToken,
    Update,
)

REASONS = {
    FinishReason.STOP_EOS: "stop",
    FinishReason.STOP_TOKEN: "stop",
    FinishReason.STOP_STRING: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.DEADLINE: "abort",
    FinishReason.ERROR: "error",
}


@dataclass(slots=True)
class _Choice:
    """What a choice has told so far."""

    token_ids: list[int] = field(default_factory=list)
    tokens: list[GeneratedToken] = field(default_factory=list)  # where they are told at its end
    prompt: Any = None  # InputLogProbs


class VllmResponder:
    """Makes the answer to one request out of its updates; use it once."""

    def __init__(self, request: GenerationRequest, *, stream: bool) -> None:
        self._stream = stream
        self._prompt_tokens = len(request.prompt_token_ids)
        self._wants_logprobs = request.output.wants_logprobs
        self._choices = [_Choice() for _ in range(request.sampling.n)]

    async def answers(self, updates: AsyncIterator[Update]) -> AsyncIterator[Any]:
        """A chunk for each update where the request streams, and one `complete` for each choice."""
        async for update in updates:
            note_in_log(update)
            choice = self._choices[update.index]
            choice.token_ids += [token.id for token in update.tokens]
            if update.prompt:
                # A long prompt with many tokens beside each takes a while.
                choice.prompt = await asyncio.to_thread(_input_logprobs, update.prompt)
            if not self._stream:
                choice.tokens += update.tokens
            elif update.tokens or update.prompt:
                yield pb.GenerateResponse(chunk=self._chunk(update, choice))
            if update.finish is not None:
                yield pb.GenerateResponse(complete=self._complete(update, choice))

    def _chunk(self, update: Update, choice: _Choice) -> Any:
        prompt, choice.prompt = choice.prompt, None  # told once
        return pb.GenerateStreamChunk(
            token_ids=[token.id for token in update.tokens],
            prompt_tokens=self._prompt_tokens,
            completion_tokens=len(update.tokens),  # of this chunk
            output_logprobs=self._logprobs(update.tokens),
            input_logprobs=prompt,
            index=update.index,
        )

    def _complete(self, update: Update, choice: _Choice) -> Any:
        finish = update.finish
        assert finish is not None
        sparsity = finish.sparsity
        complete = pb.GenerateComplete(
            output_ids=choice.token_ids,
            finish_reason=REASONS[finish.reason],
            prompt_tokens=finish.prompt_tokens,
            completion_tokens=finish.completion_tokens,
            cached_tokens=finish.cached_tokens,
            output_logprobs=self._logprobs(choice.tokens),
            input_logprobs=choice.prompt,
            index=update.index,
            spec_accepted_tokens=sparsity.accepted_tokens,
            spec_draft_tokens=sparsity.drafted_tokens,
        )
        if finish.stop_string is not None:
            complete.matched_stop_str = finish.stop_string
        elif finish.stop_token_id is not None:
            complete.matched_token_id = finish.stop_token_id
        return complete

    def _logprobs(self, tokens: Sequence[GeneratedToken]) -> Any:
        if not (self._wants_logprobs and tokens):
            return None
        return pb.OutputLogProbs(
            token_logprobs=[token.logprob for token in tokens],
            token_ids=[token.id for token in tokens],
            top_logprobs=[_top(token) for token in tokens],
        )


def _input_logprobs(prompt: Sequence[PromptToken]) -> Any:
    return pb.InputLogProbs(
        token_logprobs=[pb.InputTokenLogProb(value=token.logprob) for token in prompt],
        token_ids=[token.id for token in prompt],
        top_logprobs=[_top(token) for token in prompt],
    )


def _top(token: GeneratedToken | PromptToken) -> Any:
    return pb.TopLogProbs(
        values=[top.logprob for top in token.top], token_ids=[top.id for top in token.top]
    )
