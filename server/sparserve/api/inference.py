"""InferenceService: text generation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from sparserve.api import convert
from sparserve.engine.async_engine import AsyncEngine
from sparserve.engine.request import GeneratedToken, GenerationRequest
from sparserve.errors import NotBuiltYet, RequestError, UnknownModel
from sparserve.logs import current_call
from sparserve.v1 import inference_pb2 as pb
from sparserve.v1 import inference_pb2_grpc


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Messages to engine calls; every error is raised and becomes a status in the interceptor."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        generation = await self._parse(request, context)
        texts: list[str] = []
        tokens: tuple[GeneratedToken, ...] = ()
        finish = None
        with self._engine.submit(generation) as stream:
            async for update in stream:
                current_call().completion_tokens += len(update.tokens)
                texts.append(update.text)
                tokens += update.tokens
                finish = update.finish
        assert finish is not None
        choice = pb.Choice(
            index=0,
            text="".join(texts) if _wants_text(request) else "",
            tokens=convert.tokens(tokens, request.response),
            finished=convert.finished(finish),
        )
        return pb.GenerateResponse(
            request_id=generation.request_id,
            model=self._model_name,
            choices=[choice],
            usage=convert.usage(finish),
            timings=convert.timings(finish),
            sparsity=convert.sparsity_report(generation.policy, finish),
        )

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        generation = await self._parse(request, context)
        with self._engine.submit(generation) as stream:
            started = pb.Started(
                request_id=generation.request_id,
                model=self._model_name,
                prompt_tokens=len(generation.prompt_token_ids),
            )
            yield pb.GenerateStreamResponse(started=started)
            async for update in stream:
                current_call().completion_tokens += len(update.tokens)
                text = update.text if _wants_text(request) else ""
                tokens = convert.tokens(update.tokens, request.response)
                if text or tokens:
                    delta = pb.Delta(index=0, text=text, tokens=tokens)
                    yield pb.GenerateStreamResponse(delta=delta)
                if update.finish is not None:
                    yield pb.GenerateStreamResponse(finished=convert.finished(update.finish))
                    summary = pb.Summary(
                        usage=convert.usage(update.finish),
                        timings=convert.timings(update.finish),
                        sparsity=convert.sparsity_report(generation.policy, update.finish),
                    )
                    yield pb.GenerateStreamResponse(summary=summary)

    async def Chat(self, request: pb.ChatRequest, context: Any) -> pb.GenerateResponse:
        raise NotBuiltYet("Chat", "Chat is not built yet; use Generate")

    async def ChatStream(
        self, request: pb.ChatRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        raise NotBuiltYet("ChatStream", "ChatStream is not built yet; use GenerateStream")
        yield

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        raise NotBuiltYet("Tokenize", "Tokenize is not built yet")

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Any
    ) -> pb.DetokenizeResponse:
        raise NotBuiltYet("Detokenize", "Detokenize is not built yet")

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        raise NotBuiltYet("Embed", "this server generates text only; it makes no embeddings")

    async def _parse(self, request: pb.GenerateRequest, context: Any) -> GenerationRequest:
        arrival = time.monotonic()
        call = current_call()
        call.request_id, call.user = request.request_id, request.user
        self._engine.check_room()  # before the work of tokenizing
        engine = self._engine.engine
        try:
            if request.model and request.model != self._model_name:
                raise UnknownModel(request.model, self._model_name)
            generation = await asyncio.to_thread(
                convert.parse_request,
                request,
                engine.tokenizer,
                engine.limits.max_context - 1,
                engine.backend.info.policies,
                context.time_remaining(),
                arrival,
            )
            call.request_id = generation.request_id
            call.prompt_tokens = len(generation.prompt_token_ids)
            return generation
        except RequestError:
            engine.metrics.requests_rejected.labels(reason="invalid").inc()
            raise


def _wants_text(request: pb.GenerateRequest) -> bool:
    return request.response.text if request.response.HasField("text") else True
