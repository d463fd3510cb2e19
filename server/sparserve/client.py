"""The public client: synchronous `Client` and asyncio `AsyncClient`.

    from sparserve.client import Client

    with Client("localhost:50051") as client:
        print(client.generate("The capital of France is", max_tokens=8).text)
        for delta in client.stream("Once upon a time", temperature=0.8, seed=1):
            print(delta.text, end="", flush=True)

Every failed call raises `sparserve.errors.CallFailed` with the status name, the message and what
the server said about retrying. Needs only the protocol: no model code, no torch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from sparserve.errors import CallFailed, InvalidRequest
from sparserve.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from sparserve.v1 import inference_pb2 as pb

_STATUS_KEY = "grpc-status-details-bin"
_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


@dataclass(frozen=True, slots=True)
class Result:
    """How a generation went. `finish_reason` is e.g. "STOP_EOS"; times are seconds, server-side."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    queue_seconds: float
    ttft_seconds: float
    decode_seconds: float
    policy: str
    density: float
    core_share: float | None = None
    stop: str | None = None

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first, over the time between first and last."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a stream; the last one has `result` and may have no text."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    result: Result | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    request_id: str
    text: str
    result: Result
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = field(default_factory=tuple)


def make_request(
    prompt: str | Sequence[int],
    *,
    request_id: str = "",
    model: str = "",
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool | None = None,
    token_ids: bool | None = None,
    logprobs: bool | None = None,
    report_neurons: bool | None = None,
) -> pb.GenerateRequest:
    """A request message; None leaves a field to the server's default.

    Raises InvalidRequest on a value that the protocol cannot carry, such as a negative seed.
    """
    try:
        request = pb.GenerateRequest(
            request_id=request_id,
            model=model,
            sampling=pb.Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
            stopping=pb.Stopping(max_tokens=max_tokens, stop=stop, ignore_eos=ignore_eos),
            response=pb.ResponseOptions(token_ids=token_ids, logprobs=logprobs),
            sparsity=pb.Sparsity(report=report_neurons),
        )
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
            request.token_ids.SetInParent()
    except ValueError as error:  # UnicodeEncodeError is one too
        raise InvalidRequest("request", f"the protocol cannot carry a value: {error}") from error
    return request


class Client:
    """A connection to one server, for plain programs; thread-safe.

    `generate` and `stream` take the keywords of `make_request` and `timeout` in seconds.
    """

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target, options=_OPTIONS)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._control = control_pb2_grpc.ControlServiceStub(self._channel)

    def generate(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **fields: Any
    ) -> Generation:
        """One whole generation. Raises CallFailed."""
        with _call_errors():
            return _generation(
                self._inference.Generate(make_request(prompt, **fields), timeout=timeout)
            )

    def stream(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **fields: Any
    ) -> Iterator[Delta]:
        """Pieces as they are made; closing the iterator cancels the request. Raises CallFailed."""
        call: Any = self._inference.GenerateStream(make_request(prompt, **fields), timeout=timeout)
        reader = _StreamReader()
        try:
            with _call_errors():
                for response in call:
                    if (delta := reader.read(response)) is not None:
                        yield delta
            reader.check_complete()
        finally:
            call.cancel()

    def abort(self, request_id: str) -> bool:
        """True where the request was in flight and is now ended."""
        with _call_errors():
            response = self._control.Abort(control_pb2.AbortRequest(request_ids=[request_id]))
        return bool(response.aborted)

    def model_info(self) -> control_pb2.GetModelInfoResponse:
        with _call_errors():
            return self._control.GetModelInfo(control_pb2.GetModelInfoRequest())

    def server_info(self) -> control_pb2.GetServerInfoResponse:
        with _call_errors():
            return self._control.GetServerInfo(control_pb2.GetServerInfoRequest())

    def load(self) -> control_pb2.GetLoadResponse:
        with _call_errors():
            return self._control.GetLoad(control_pb2.GetLoadRequest())

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


class AsyncClient:
    """The same for asyncio; use it on the loop it was made on."""

    def __init__(self, target: str) -> None:
        self._channel: Any = grpc.aio.insecure_channel(target, options=_OPTIONS)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._control = control_pb2_grpc.ControlServiceStub(self._channel)

    async def generate(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **fields: Any
    ) -> Generation:
        """One whole generation. Raises CallFailed."""
        with _call_errors():
            return _generation(
                await self._inference.Generate(make_request(prompt, **fields), timeout=timeout)
            )

    async def stream(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **fields: Any
    ) -> AsyncIterator[Delta]:
        """Pieces as they are made; closing the iterator cancels the request. Raises CallFailed."""
        call: Any = self._inference.GenerateStream(make_request(prompt, **fields), timeout=timeout)
        reader = _StreamReader()
        try:
            with _call_errors():
                async for response in call:
                    if (delta := reader.read(response)) is not None:
                        yield delta
            reader.check_complete()
        finally:
            call.cancel()

    async def abort(self, request_id: str) -> bool:
        """True where the request was in flight and is now ended."""
        with _call_errors():
            response = await self._control.Abort(control_pb2.AbortRequest(request_ids=[request_id]))
        return bool(response.aborted)

    async def model_info(self) -> control_pb2.GetModelInfoResponse:
        with _call_errors():
            return await self._control.GetModelInfo(control_pb2.GetModelInfoRequest())

    async def server_info(self) -> control_pb2.GetServerInfoResponse:
        with _call_errors():
            return await self._control.GetServerInfo(control_pb2.GetServerInfoRequest())

    async def load(self) -> control_pb2.GetLoadResponse:
        with _call_errors():
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


class _StreamReader:
    """Turns the events of one stream into deltas."""

    def __init__(self) -> None:
        self._finished: pb.Finished | None = None
        self._complete = False

    def read(self, response: pb.GenerateStreamResponse) -> Delta | None:
        match response.WhichOneof("event"):
            case "delta":
                tokens = response.delta.tokens
                return Delta(
                    response.delta.text,
                    tuple(t.id for t in tokens),
                    tuple(t.logprob for t in tokens if t.HasField("logprob")),
                )
            case "finished":
                self._finished = response.finished
            case "summary":
                assert self._finished is not None
                self._complete = True
                return Delta(result=_result(self._finished, response.summary))
        return None

    def check_complete(self) -> None:
        if not self._complete:
            raise CallFailed("INTERNAL", "the stream ended without a summary")


def _generation(response: pb.GenerateResponse) -> Generation:
    choice = response.choices[0]
    return Generation(
        request_id=response.request_id,
        text=choice.text,
        result=_result(choice.finished, response),
        token_ids=tuple(t.id for t in choice.tokens),
        logprobs=tuple(t.logprob for t in choice.tokens if t.HasField("logprob")),
    )


def _result(finished: pb.Finished, summary: pb.Summary | pb.GenerateResponse) -> Result:
    sparsity = summary.sparsity
    return Result(
        finish_reason=pb.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_"),
        prompt_tokens=summary.usage.prompt_tokens,
        completion_tokens=summary.usage.completion_tokens,
        queue_seconds=summary.timings.queue_seconds,
        ttft_seconds=summary.timings.ttft_seconds,
        decode_seconds=summary.timings.decode_seconds,
        policy=pb.SparsityPolicy.Name(sparsity.policy).removeprefix("SPARSITY_POLICY_").lower(),
        density=sparsity.density,
        core_share=sparsity.core_share if sparsity.HasField("core_share") else None,
        stop=finished.stop if finished.HasField("stop") else None,
    )


@contextmanager
def _call_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise _call_failed(error) from error


def _call_failed(error: Any) -> CallFailed:
    metadata: dict[str, bytes] = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(metadata.get(_STATUS_KEY, b""))
    retry_after, violations = None, {}
    for detail in status.details:
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo.FromString(detail.value)
            retry_after = retry.retry_delay.ToMilliseconds() / 1000
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest.FromString(detail.value)
            violations = {v.field: v.description for v in bad.field_violations}
    return CallFailed(error.code().name, error.details() or "", retry_after, violations)
