"""InferenceService: text generation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from sparserve.api.generation import parse_generation
from sparserve.api.requests import check_model, conversation_of
from sparserve.api.responses import Responder
from sparserve.api.security.auth import current_caller
from sparserve.engine.async_engine import AsyncEngine
from sparserve.engine.limits import check_token_ids
from sparserve.engine.request import GenerationRequest
from sparserve.engine.tokenizer import TextTokenizer
from sparserve.errors import InvalidRequest, NotBuiltYet, PromptTooLong
from sparserve.v1 import inference_pb2 as pb
from sparserve.v1 import inference_pb2_grpc

# For Tokenize and Detokenize, which no context bounds.
MAX_TOKENS = 1 << 20


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Messages to engine calls; every error is raised and becomes a status in the interceptor."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        return await self._whole(request, context)

    async def Chat(self, request: pb.ChatRequest, context: Any) -> pb.GenerateResponse:
        return await self._whole(request, context)

    def GenerateStream(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        return self._stream(request, context)

    def ChatStream(
        self, request: pb.ChatRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        return self._stream(request, context)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        check_model(request.model, self._model_name)
        text, ids = await asyncio.to_thread(_tokenize, request, self._tokenizer)
        return pb.TokenizeResponse(
            token_ids=ids, text=text, max_context_length=self._engine.engine.limits.max_context
        )

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Any
    ) -> pb.DetokenizeResponse:
        check_model(request.model, self._model_name)
        text = await asyncio.to_thread(_detokenize, request, self._tokenizer)
        return pb.DetokenizeResponse(text=text)

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        raise NotBuiltYet("Embed", "this server generates text only; it makes no embeddings")

    @property
    def _tokenizer(self) -> TextTokenizer:
        return self._engine.engine.tokenizer

    async def _whole(
        self, request: pb.GenerateRequest | pb.ChatRequest, context: Any
    ) -> pb.GenerateResponse:
        caller = current_caller()
        caller.check_tokens()  # before the work of tokenizing
        generation, responder = await self._parse(request, context)
        with self._engine.submit(caller.claim(generation), caller) as updates:
            return await responder.whole(updates)

    async def _stream(
        self, request: pb.GenerateRequest | pb.ChatRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        caller = current_caller()
        caller.check_tokens()  # before the work of tokenizing
        generation, responder = await self._parse(request, context)
        with self._engine.submit(caller.claim(generation), caller) as updates:
            async for event in responder.stream(updates):
                yield event

    async def _parse(
        self, request: pb.GenerateRequest | pb.ChatRequest, context: Any
    ) -> tuple[GenerationRequest, Responder]:
        generation = await parse_generation(request, context, self._engine, self._model_name)
        responder = Responder(generation, request.response, self._tokenizer, self._model_name)
        return generation, responder


def _tokenize(request: pb.TokenizeRequest, tokenizer: TextTokenizer) -> tuple[str, tuple[int, ...]]:
    kind = request.WhichOneof("input")
    if kind == "text":
        text = request.text
        ids = tokenizer.encode(text, MAX_TOKENS)
    elif kind == "chat":
        text = tokenizer.render_chat(conversation_of(request.chat))
        ids = tokenizer.encode_chat(text, MAX_TOKENS)
    else:
        raise InvalidRequest("input", "the request has no input; set text or chat")
    if len(ids) > MAX_TOKENS:
        raise PromptTooLong(
            kind, f"the {kind} has {len(ids)} tokens, the limit is {MAX_TOKENS}", MAX_TOKENS
        )
    return text, ids


def _detokenize(request: pb.DetokenizeRequest, tokenizer: TextTokenizer) -> str:
    if len(request.token_ids) > MAX_TOKENS:
        raise InvalidRequest(
            "token_ids", f"{len(request.token_ids)} token ids given, the limit is {MAX_TOKENS}"
        )
    check_token_ids("token_ids", request.token_ids, tokenizer.vocab_size)
    skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
    return tokenizer.decode(request.token_ids, skip_special_tokens=skip)
