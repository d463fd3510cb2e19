"""What the engine tells of a request, as `vllm.GenerateResponse`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from sparserve.api.responses import note_in_log
from sparserve.engine.request import Finish, FinishReason, GeneratedToken, PromptToken, Update
from sparserve.protocols import vllm_inference_pb2 as pb

_REASONS = {
    FinishReason.STOP_EOS: pb.FinishInfo.STOP,
    FinishReason.STOP_TOKEN: pb.FinishInfo.STOP,
    FinishReason.STOP_STRING: pb.FinishInfo.STOP,
    FinishReason.LENGTH: pb.FinishInfo.LENGTH,
    FinishReason.CONTEXT: pb.FinishInfo.LENGTH,
    FinishReason.CANCELLED: pb.FinishInfo.ABORTED,
}
Token = GeneratedToken | PromptToken


class Responder:
    """Makes the answer to one request, whole or as a stream, out of its updates."""

    def __init__(self, options: pb.ResponseOptions, prompt_token_ids: Sequence[int]) -> None:
        self._options = options
        self._prompt = prompt_token_ids
        self._is_first = True
        self._wants_text = options.output_text if options.HasField("output_text") else True

    async def whole(self, updates: AsyncIterator[Update]) -> pb.GenerateResponse:
        """Of a request for one sequence; reads `updates` to their end."""
        texts: list[str] = []
        tokens: list[GeneratedToken] = []
        prompt: tuple[PromptToken, ...] = ()
        finish = None
        async for update in updates:
            note_in_log(update)
            texts.append(update.text)
            tokens += update.tokens
            prompt, finish = update.prompt or prompt, update.finish
        merged = Update("", text="".join(texts), tokens=tuple(tokens), finish=finish)
        return pb.GenerateResponse(
            prompt_info=await self._prompt_info(prompt),
            outputs=self._output(merged),
        )

    async def response(self, update: Update) -> pb.GenerateResponse:
        """The next of a stream; the first one tells of the prompt too."""
        note_in_log(update)
        response = pb.GenerateResponse(outputs=self._output(update))
        if self._is_first:
            self._is_first = False
            response.prompt_info.CopyFrom(await self._prompt_info(update.prompt))
        return response

    def _output(self, update: Update) -> pb.SequenceOutput:
        options, tokens = self._options, update.tokens
        output = pb.SequenceOutput(
            index=update.index,
            text=update.text if self._wants_text else "",
            num_tokens=len(tokens),
            token_ids=[token.id for token in tokens] if options.output_token_ids else (),
            finish_info=None if update.finish is None else _finish_info(update.finish),
        )
        if options.output_logprobs:
            output.logprobs.extend(token.logprob or 0.0 for token in tokens)
            output.ranks.extend(map(_rank, tokens))
        if options.HasField("output_candidates"):
            output.candidate_tokens.extend(map(_candidates, tokens))
        return output

    async def _prompt_info(self, tokens: Sequence[PromptToken]) -> pb.PromptInfo:
        """`tokens` are empty unless log probabilities of the prompt were asked for."""
        if not tokens:
            return self._make_prompt_info(tokens)
        # A long prompt with many tokens beside each takes a second.
        return await asyncio.to_thread(self._make_prompt_info, tokens)

    def _make_prompt_info(self, tokens: Sequence[PromptToken]) -> pb.PromptInfo:
        options = self._options
        info = pb.PromptInfo(
            num_prompt_tokens=len(self._prompt),
            token_ids=self._prompt if options.prompt_token_ids else (),
        )
        if options.prompt_logprobs:
            info.logprobs.extend(token.logprob or 0.0 for token in tokens)
            info.ranks.extend(map(_rank, tokens))
        if options.HasField("prompt_candidates"):
            info.candidate_tokens.extend(map(_candidates, tokens))
        return info


def _rank(token: Token) -> int:
    """From 1; 0 where the token is not among the candidates."""
    return next((rank for rank, top in enumerate(token.top, 1) if top.id == token.id), 0)


def _candidates(token: Token) -> pb.CandidateTokenInfo:
    others = [
        pb.CandidateTokenInfo.TokenInfo(id=top.id, logprob=top.logprob, rank=rank)
        for rank, top in enumerate(token.top, 1)
        if top.id != token.id
    ]
    return pb.CandidateTokenInfo(tokens=others)


def _finish_info(finish: Finish) -> pb.FinishInfo:
    info = pb.FinishInfo(
        num_output_tokens=finish.completion_tokens, finish_reason=_REASONS[finish.reason]
    )
    if finish.stop_string is not None:
        info.stop_string = finish.stop_string
    elif finish.stop_token_id is not None and finish.reason is FinishReason.STOP_EOS:
        info.eos_token_id = finish.stop_token_id
    elif finish.stop_token_id is not None:
        info.stop_token_id = finish.stop_token_id
    return info
