"""The client for plain programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Unpack

import grpc

from sparserve.client.calls import (
    ChannelOptions,
    Metadata,
    call_options,
    open_channel,
)
from sparserve.client.connection import Security, connection
from sparserve.client.messages import Message
from sparserve.client.requests import ChatFields, Fields, make_chat_request, make_request
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
from sparserve.client.values import filled
from sparserve.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from sparserve.v1 import inference_pb2 as pb


class Client:
    """A connection to one server, for plain programs; thread-safe.

    `generate`, `chat` and their streams take the keywords of `Fields` and `ChatFields`. Every call takes
    `timeout` in seconds and `metadata` such as {"traceparent": "00-…"}; `options` are gRPC's channel options,
    beside or over those set here.

    The connection is plain text unless the target begins with grpcs://, or one of `credentials`, `tls_ca`
    (the authorities to trust instead of the system's), `tls_cert` and `tls_key` (the client's own) is given;
    they are names of PEM files, or their bytes. `api_key` goes with every call; where that would be in plain
    text over a network, the target must say grpc://.

    Every call raises CallFailed, and InvalidRequest before anything is sent.
    """

    def __init__(
        self,
        target: str,
        *,
        options: ChannelOptions = (),
        credentials: grpc.ChannelCredentials | None = None,
        **security: Unpack[Security],
    ) -> None:
        to = connection(target, credentials, **security)
        self._authorization = to.authorization
        self._channel = open_channel(grpc, to, options)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._control = control_pb2_grpc.ControlServiceStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **fields: Unpack[Fields],
    ) -> Generation:
        """One whole generation. Raises CallFailed."""
        request = make_request(prompt, **fields)
        with call_errors():
            return generation(
                self._inference.Generate(request, **self._with_call(timeout, metadata))
            )

    def chat(
        self,
        messages: Sequence[Message],
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **fields: Unpack[ChatFields],
    ) -> Generation:
        """The model's answer to a conversation. Raises CallFailed."""
        request = make_chat_request(messages, **fields)
        with call_errors():
            return generation(self._inference.Chat(request, **self._with_call(timeout, metadata)))

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **fields: Unpack[Fields],
    ) -> Iterator[Delta]:
        """Pieces as they are made; closing the iterator cancels the request. Raises CallFailed."""
        request = make_request(prompt, **fields)
        return self._deltas(
            self._inference.GenerateStream, request, self._with_call(timeout, metadata)
        )

    def chat_stream(
        self,
        messages: Sequence[Message],
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **fields: Unpack[ChatFields],
    ) -> Iterator[Delta]:
        """As `stream`, for a conversation."""
        request = make_chat_request(messages, **fields)
        return self._deltas(self._inference.ChatStream, request, self._with_call(timeout, metadata))

    def tokenize(
        self,
        text: str,
        *,
        model: str | None = None,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> Tokenization:
        """The token ids that a prompt would have."""
        request = filled(pb.TokenizeRequest(), text=text, model=model)
        with call_errors():
            return tokenization(
                self._inference.Tokenize(request, **self._with_call(timeout, metadata))
            )

    def tokenize_chat(
        self,
        messages: Sequence[Message],
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **fields: Unpack[ChatFields],
    ) -> Tokenization:
        """The prompt that `chat` would make of a conversation."""
        request = pb.TokenizeRequest(chat=make_chat_request(messages, **fields))
        with call_errors():
            return tokenization(
                self._inference.Tokenize(request, **self._with_call(timeout, metadata))
            )

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        model: str | None = None,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> str:
        """The text of token ids, by default without special tokens."""
        request = filled(
            pb.DetokenizeRequest(),
            token_ids=token_ids,
            skip_special_tokens=skip_special_tokens,
            model=model,
        )
        with call_errors():
            response = self._inference.Detokenize(request, **self._with_call(timeout, metadata))
        return str(response.text)

    def tokenizer_files(
        self,
        *,
        model: str | None = None,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> dict[str, bytes]:
        """The tokenizer as the files of a Hugging Face folder: name -> content."""
        request = filled(control_pb2.GetTokenizerRequest(), model=model)
        reader = ArchiveReader()
        with call_errors():
            for part in self._control.GetTokenizer(request, **self._with_call(timeout, metadata)):
                reader.read(part)
        return reader.files()

    def drain(
        self,
        timeout_seconds: float | None = None,
        on_progress: Callable[[int], None] = lambda in_flight: None,
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> None:
        """Have the server take no new requests, and wait until none is in flight.

        `timeout_seconds` is what those in flight get, `timeout` what this call gets. Leaving the wait
        does not undo the drain.
        """
        request = filled(control_pb2.DrainRequest(), timeout_seconds=timeout_seconds)
        reader = DrainReader()
        with call_errors():
            for response in self._control.Drain(request, **self._with_call(timeout, metadata)):
                on_progress(reader.read(response))
        reader.check_complete()

    def abort(
        self,
        request_ids: str | Iterable[str],
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> tuple[str, ...]:
        """End requests by their id, one or several; -> those that were in flight."""
        ids = [request_ids] if isinstance(request_ids, str) else request_ids
        request = filled(control_pb2.AbortRequest(), request_ids=ids)
        with call_errors():
            response = self._control.Abort(request, **self._with_call(timeout, metadata))
        return tuple(response.aborted)

    def list_models(
        self,
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> tuple[str, ...]:
        """The names that `model` takes."""
        request = control_pb2.ListModelsRequest()
        with call_errors():
            response = self._control.ListModels(request, **self._with_call(timeout, metadata))
        return tuple(model.name for model in response.models)

    def model_info(
        self,
        *,
        model: str | None = None,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> control_pb2.GetModelInfoResponse:
        request = filled(control_pb2.GetModelInfoRequest(), model=model)
        with call_errors():
            response: control_pb2.GetModelInfoResponse = self._control.GetModelInfo(
                request, **self._with_call(timeout, metadata)
            )
        return response

    def server_info(
        self,
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> control_pb2.GetServerInfoResponse:
        request = control_pb2.GetServerInfoRequest()
        with call_errors():
            response: control_pb2.GetServerInfoResponse = self._control.GetServerInfo(
                request, **self._with_call(timeout, metadata)
            )
        return response

    def load(
        self,
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> control_pb2.GetLoadResponse:
        request = control_pb2.GetLoadRequest()
        with call_errors():
            response: control_pb2.GetLoadResponse = self._control.GetLoad(
                request, **self._with_call(timeout, metadata)
            )
        return response

    def _with_call(self, timeout: float | None, metadata: Metadata | None) -> dict[str, Any]:
        return call_options(timeout, metadata, self._authorization)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _deltas(
        self, method: Any, request: pb.GenerateRequest | pb.ChatRequest, options: dict[str, Any]
    ) -> Iterator[Delta]:
        call = method(request, **options)
        reader = StreamReader()
        try:
            with call_errors():
                for response in call:
                    if (delta := reader.read(response)) is not None:
                        yield delta
            reader.check_complete()
        finally:
            call.cancel()
