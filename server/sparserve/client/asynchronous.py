"""The client for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Unpack

import grpc

from sparserve.client.plain import OPTIONS
from sparserve.client.requests import ChatFields, Fields, Message, make_chat_request, make_request
from sparserve.client.responses import (
    ArchiveReader,
    Delta,
    DrainReader,
    Generation,
    StreamReader,
    Tokenization,
    call_errors,
    generation,
    tokenization,
)
from sparserve.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from sparserve.v1 import inference_pb2 as pb


class AsyncClient:
    """As `Client`, for asyncio; use it on the loop it was made on."""

    def __init__(self, target: str) -> None:
        self._channel: Any = grpc.aio.insecure_channel(target, options=OPTIONS)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._control = control_pb2_grpc.ControlServiceStub(self._channel)

    async def generate(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **fields: Unpack[Fields]
    ) -> Generation:
        """One whole generation. Raises CallFailed."""
        request = make_request(prompt, **fields)
        with call_errors():
            return generation(await self._inference.Generate(request, timeout=timeout))

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        timeout: float | None = None,
        **fields: Unpack[ChatFields],
    ) -> Generation:
        """The model's answer to a conversation. Raises CallFailed."""
        request = make_chat_request(messages, **fields)
        with call_errors():
            return generation(await self._inference.Chat(request, timeout=timeout))

    def stream(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **fields: Unpack[Fields]
    ) -> AsyncIterator[Delta]:
        """Pieces as they are made; closing the iterator cancels the request. Raises CallFailed."""
        request = make_request(prompt, **fields)
        return self._deltas(self._inference.GenerateStream, request, timeout)

    def chat_stream(
        self,
        messages: Sequence[Message],
        *,
        timeout: float | None = None,
        **fields: Unpack[ChatFields],
    ) -> AsyncIterator[Delta]:
        """As `stream`, for a conversation."""
        request = make_chat_request(messages, **fields)
        return self._deltas(self._inference.ChatStream, request, timeout)

    async def tokenize(self, text: str) -> Tokenization:
        """The token ids that a prompt would have."""
        with call_errors():
            return tokenization(await self._inference.Tokenize(pb.TokenizeRequest(text=text)))

    async def tokenize_chat(
        self, messages: Sequence[Message], **fields: Unpack[ChatFields]
    ) -> Tokenization:
        """The prompt that `chat` would make of a conversation."""
        request = pb.TokenizeRequest(chat=make_chat_request(messages, **fields))
        with call_errors():
            return tokenization(await self._inference.Tokenize(request))

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool | None = None
    ) -> str:
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        with call_errors():
            return (await self._inference.Detokenize(request)).text

    async def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer as the files of a Hugging Face folder: name -> content."""
        reader = ArchiveReader()
        with call_errors():
            async for part in self._control.GetTokenizer(control_pb2.GetTokenizerRequest()):
                reader.read(part)
        return reader.files()

    async def drain(
        self,
        timeout_seconds: float | None = None,
        on_progress: Callable[[int], None] = lambda in_flight: None,
    ) -> None:
        """Have the server take no new requests, and wait until none is in flight.

        `timeout_seconds` is what those in flight get. Leaving the wait does not undo the drain.
        """
        request = control_pb2.DrainRequest(timeout_seconds=timeout_seconds)
        reader = DrainReader()
        with call_errors():
            async for response in self._control.Drain(request):
                on_progress(reader.read(response))
        reader.check_complete()

    async def abort(self, request_id: str) -> bool:
        """True where the request was in flight and is now ended."""
        request = control_pb2.AbortRequest(request_ids=[request_id])
        with call_errors():
            response = await self._control.Abort(request)
        return bool(response.aborted)

    async def model_info(self) -> control_pb2.GetModelInfoResponse:
        with call_errors():
            return await self._control.GetModelInfo(control_pb2.GetModelInfoRequest())

    async def server_info(self) -> control_pb2.GetServerInfoResponse:
        with call_errors():
            return await self._control.GetServerInfo(control_pb2.GetServerInfoRequest())

    async def load(self) -> control_pb2.GetLoadResponse:
        with call_errors():
            return await self._control.GetLoad(control_pb2.GetLoadRequest())

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _deltas(
        self, method: Any, request: pb.GenerateRequest | pb.ChatRequest, timeout: float | None
    ) -> AsyncIterator[Delta]:
        call = method(request, timeout=timeout)
        reader = StreamReader()
        try:
            with call_errors():
                async for response in call:
                    if (delta := reader.read(response)) is not None:
                        yield delta
            reader.check_complete()
        finally:
            call.cancel()
