"""What the engine tells of a request, as protocol messages."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence

from sparserve.api.requests import POLICIES
from sparserve.engine.request import (
    Finish,
    FinishReason,
    GeneratedToken,
    GenerationRequest,
    PromptToken,
    Update,
    merge_finishes,
)
from sparserve.engine.tokenizer import TextTokenizer
from sparserve.logs import current_call
from sparserve.v1 import inference_pb2 as pb

POLICY_NUMBERS = {kind: number for number, kind in POLICIES.items()}

REASONS = {
    FinishReason.STOP_EOS: pb.FINISH_REASON_STOP_EOS,
    FinishReason.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CONTEXT: pb.FINISH_REASON_CONTEXT,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}


class Responder:
    """Makes the answer to one request, whole or as a stream, out of its updates."""

    def __init__(
        self,
        request: GenerationRequest,
        options: pb.ResponseOptions,
        tokenizer: TextTokenizer,
        model_name: str,
    ) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._wants_text = options.text if options.HasField("text") else True
        self._wants_logprobs = options.logprobs or options.top_logprobs > 0
        self._wants_tokens = options.token_ids or self._wants_logprobs
        self._finishes: dict[int, Finish] = {}

    async def whole(self, updates: AsyncIterator[Update]) -> pb.GenerateResponse:
        """Reads `updates` to their end."""
        texts: defaultdict[int, list[str]] = defaultdict(list)
        tokens: defaultdict[int, list[pb.Token]] = defaultdict(list)
        prompt = None
        async for update in updates:
            texts[update.index].append(update.text)
            tokens[update.index] += self._tokens(update.tokens)
            prompt = await self._prompt(update) or prompt
            self._note(update)
        choices = [
            pb.Choice(
                index=index,
                text="".join(texts[index]) if self._wants_text else "",
                tokens=tokens[index],
                finished=_finished(index, finish),
            )
            for index, finish in self._in_order()
        ]
        summary = self._summary()
        return pb.GenerateResponse(
            request_id=self._request.request_id,
            model=self._model_name,
            choices=choices,
            usage=summary.usage,
            timings=summary.timings,
            sparsity=summary.sparsity,
            prompt=prompt,
        )

    async def stream(
        self, updates: AsyncIterator[Update]
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """The events of GenerateStream, one summary after the last choice's end.

        Nothing comes before the first update: what has not begun, a balancer can send to another server.
        """
        started = pb.Started(
            request_id=self._request.request_id,
            model=self._model_name,
            prompt_tokens=len(self._request.prompt_token_ids),
        )
        begun = False
        async for update in updates:
            if not begun:
                yield pb.GenerateStreamResponse(started=started)
                begun = True
            if (prompt := await self._prompt(update)) is not None:
                yield pb.GenerateStreamResponse(prompt=prompt)
            for event in self._events(update):
                yield event
        yield pb.GenerateStreamResponse(summary=self._summary())

    def _events(self, update: Update) -> Iterator[pb.GenerateStreamResponse]:
        text = update.text if self._wants_text else ""
        tokens = self._tokens(update.tokens)
        if text or tokens:
            delta = pb.Delta(index=update.index, text=text, tokens=tokens)
            yield pb.GenerateStreamResponse(delta=delta)
        self._note(update)
        if update.finish is not None:
            finished = _finished(update.index, update.finish)
            yield pb.GenerateStreamResponse(finished=finished)

    async def _prompt(self, update: Update) -> pb.PromptLogprobs | None:
        if not update.prompt:
            return None
        # A long prompt with many tokens beside each takes a second.
        tokens = await asyncio.to_thread(lambda: [self._token(t) for t in update.prompt])
        return pb.PromptLogprobs(tokens=tokens)

    def _tokens(self, generated: Sequence[GeneratedToken]) -> list[pb.Token]:
        """Empty unless ids or log probabilities were asked for."""
        if not self._wants_tokens:
            return []
        if not self._wants_logprobs:
            return [pb.Token(id=token.id) for token in generated]
        return [self._token(token) for token in generated]

    def _token(self, token: GeneratedToken | PromptToken) -> pb.Token:
        text = self._tokenizer.token_text
        return pb.Token(
            id=token.id,
            logprob=token.logprob,
            text=text(token.id),
            top=[pb.TopToken(id=t.id, logprob=t.logprob, text=text(t.id)) for t in token.top],
        )

    def _note(self, update: Update) -> None:
        note_in_log(update)
        if update.finish is not None:
            self._finishes[update.index] = update.finish

    def _in_order(self) -> list[tuple[int, Finish]]:
        return sorted(self._finishes.items(), key=lambda item: item[0])

    def _summary(self) -> pb.Summary:
        whole = merge_finishes([finish for _, finish in self._in_order()])
        return pb.Summary(
            usage=pb.Usage(
                prompt_tokens=whole.prompt_tokens,
                cached_tokens=whole.cached_tokens,
                completion_tokens=whole.completion_tokens,
            ),
            timings=_timings(whole),
            sparsity=_sparsity_report(whole),
        )


def note_in_log(update: Update) -> None:
    """For the line that ends the call."""
    call = current_call()
    call.completion_tokens += len(update.tokens)
    if update.finish is not None:
        call.finish_reasons.append(update.finish.reason.value)
        call.policy = update.finish.sparsity.policy.value
        call.densities.append(update.finish.sparsity.density)
        if update.index == 0:
            call.cached_tokens = update.finish.cached_tokens
            call.ttft_seconds = update.finish.timings.ttft


def _finished(index: int, finish: Finish) -> pb.Finished:
    message = pb.Finished(index=index, reason=REASONS[finish.reason])
    if finish.stop_string is not None:
        message.stop = finish.stop_string
    elif finish.stop_token_id is not None:
        message.token_id = finish.stop_token_id
    return message


def _timings(finish: Finish) -> pb.Timings:
    times = finish.timings
    return pb.Timings(
        queue_seconds=times.queue,
        ttft_seconds=times.ttft,
        prefill_seconds=times.prefill,
        decode_seconds=times.decode,
    )


def _sparsity_report(finish: Finish) -> pb.SparsityReport:
    report = finish.sparsity
    return pb.SparsityReport(
        policy=POLICY_NUMBERS[report.policy],
        density=report.density,
        core_share=finish.core_share,
        mlp_bytes_per_token=report.mlp_bytes_per_token,
        bytes_per_token=report.bytes_per_token,
        refreshes=report.refreshes,
        drafted_tokens=report.drafted_tokens,
        accepted_tokens=report.accepted_tokens,
        predicted_kl=report.predicted_kl,
        coverage=report.coverage,
        stable=report.stable,
        fallbacks=report.fallbacks,
        dense_share=report.dense_share,
    )
