"""Response messages to results, and statuses to errors."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from sparserve.errors import CallFailed
from sparserve.v1 import control_pb2
from sparserve.v1 import inference_pb2 as pb

_STATUS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class TopToken:
    id: int
    logprob: float
    text: str


@dataclass(frozen=True, slots=True)
class Token:
    """A token; `logprob`, `text` and the likeliest tokens in its place only where asked for."""

    id: int
    logprob: float | None = None
    text: str | None = None
    top: tuple[TopToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """How a request went. `finish_reason`, `stop` and `stop_token_id` are the first choice's,
    `finish_reason` e.g. "STOP_EOS"; tokens are those of all choices; times are seconds, server-side.
    What sparsity did is told from `policy` on; see SparsityReport in `proto/sparserve/v1/inference.proto`.
    """

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    queue_seconds: float
    ttft_seconds: float
    decode_seconds: float
    policy: str
    density: float
    core_share: float | None = None
    mlp_bytes_per_token: float = 0.0
    bytes_per_token: float = 0.0
    refreshes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    predicted_kl: float | None = None
    coverage: float | None = None
    stable: bool | None = None
    fallbacks: int = 0
    dense_share: float = 1.0
    stop: str | None = None
    cached_tokens: int = 0
    stop_token_id: int | None = None
    request_id: str = ""

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first, over the time between first and last."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a stream: text and tokens of one choice, or its end, or something of them all.

    The first piece comes when the request is accepted and has nothing but `request_id`, which stands
    on every piece; `finish_reason` with what matched (`stop` or `stop_token_id`) comes with a choice's
    last piece, `prompt` before the first text, `result` last.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    index: int = 0
    finish_reason: str | None = None
    prompt: tuple[Token, ...] = ()
    result: Result | None = None
    request_id: str = ""
    stop: str | None = None
    stop_token_id: int | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return _ids(self.tokens)

    @property
    def logprobs(self) -> tuple[float, ...]:
        return _logprobs(self.tokens)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the texts for a prompt; `stop` is the stop string, `stop_token_id` the token that ended it."""

    index: int
    text: str
    finish_reason: str
    tokens: tuple[Token, ...] = ()
    stop: str | None = None
    stop_token_id: int | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return _ids(self.tokens)

    @property
    def logprobs(self) -> tuple[float, ...]:
        return _logprobs(self.tokens)


@dataclass(frozen=True, slots=True)
class Generation:
    """The whole answer; `text`, `token_ids` and `logprobs` are the first choice's."""

    request_id: str
    choices: tuple[Choice, ...]
    result: Result
    prompt: tuple[Token, ...] = ()

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[float, ...]:
        return self.choices[0].logprobs


@dataclass(frozen=True, slots=True)
class Tokenization:
    """`text` is what was tokenized: the text given, or what the chat template made."""

    token_ids: tuple[int, ...]
    text: str
    max_context_length: int


class StreamReader:
    """Turns the events of one stream into deltas."""

    def __init__(self) -> None:
        self._request_id = ""
        self._first: pb.Finished | None = None
        self._complete = False

    def read(self, response: pb.GenerateStreamResponse) -> Delta | None:
        """None for an event of a later protocol."""
        match response.WhichOneof("event"):
            case "started":
                self._request_id = response.started.request_id
                return Delta(request_id=self._request_id)
            case "prompt":
                prompt = _tokens(response.prompt.tokens)
                return Delta(prompt=prompt, request_id=self._request_id)
            case "delta":
                delta = response.delta
                tokens = _tokens(delta.tokens)
                return Delta(delta.text, tokens, delta.index, request_id=self._request_id)
            case "finished":
                finished = response.finished
                if finished.index == 0:
                    self._first = finished
                return Delta(
                    index=finished.index,
                    finish_reason=_reason(finished),
                    request_id=self._request_id,
                    stop=_stop(finished),
                    stop_token_id=_stop_token_id(finished),
                )
            case "summary":
                assert self._first is not None
                self._complete = True
                result = _result(self._first, response.summary, self._request_id)
                return Delta(result=result, request_id=self._request_id)
        return None

    def check_complete(self) -> None:
        if not self._complete:
            raise CallFailed("INTERNAL", "the stream ended without a summary")


def generation(response: pb.GenerateResponse) -> Generation:
    return Generation(
        request_id=response.request_id,
        choices=tuple(_choice(choice) for choice in response.choices),
        result=_result(response.choices[0].finished, response, response.request_id),
        prompt=_tokens(response.prompt.tokens),
    )


def tokenization(response: pb.TokenizeResponse) -> Tokenization:
    return Tokenization(tuple(response.token_ids), response.text, response.max_context_length)


class ArchiveReader:
    """Puts the parts of GetTokenizer together."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._sha256 = ""

    def read(self, part: control_pb2.GetTokenizerResponse) -> None:
        self._data += part.data
        self._sha256 = part.sha256

    def files(self) -> dict[str, bytes]:
        """Raises CallFailed where the archive is not the one that the server sent."""
        if hashlib.sha256(self._data).hexdigest() != self._sha256:
            raise CallFailed("DATA_LOSS", "the tokenizer's archive does not match its checksum")
        with zipfile.ZipFile(io.BytesIO(self._data)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}


class DrainReader:
    """Follows a drain to its end."""

    def __init__(self) -> None:
        self._drained = False

    def read(self, response: control_pb2.DrainResponse) -> int:
        """-> requests still in flight."""
        self._drained = response.drained
        return response.requests_in_flight

    def check_complete(self) -> None:
        if not self._drained:
            raise CallFailed("INTERNAL", "the stream ended before the server was drained")


@contextmanager
def call_errors() -> Iterator[None]:
    """Turns a status into CallFailed."""
    try:
        yield
    except grpc.RpcError as error:
        raise _call_failed(error) from error


def _choice(choice: pb.Choice) -> Choice:
    finished = choice.finished
    return Choice(
        index=choice.index,
        text=choice.text,
        finish_reason=_reason(finished),
        tokens=_tokens(choice.tokens),
        stop=_stop(finished),
        stop_token_id=_stop_token_id(finished),
    )


def _tokens(tokens: Iterable[pb.Token]) -> tuple[Token, ...]:
    return tuple(
        Token(
            id=token.id,
            logprob=token.logprob if token.HasField("logprob") else None,
            text=token.text if token.HasField("text") else None,
            top=tuple(TopToken(top.id, top.logprob, top.text) for top in token.top),
        )
        for token in tokens
    )


def _ids(tokens: Iterable[Token]) -> tuple[int, ...]:
    return tuple(token.id for token in tokens)


def _logprobs(tokens: Iterable[Token]) -> tuple[float, ...]:
    return tuple(token.logprob for token in tokens if token.logprob is not None)


def _reason(finished: pb.Finished) -> str:
    return pb.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_")


def _stop(finished: pb.Finished) -> str | None:
    return finished.stop if finished.HasField("stop") else None


def _stop_token_id(finished: pb.Finished) -> int | None:
    return finished.token_id if finished.HasField("token_id") else None


def _result(
    finished: pb.Finished, summary: pb.Summary | pb.GenerateResponse, request_id: str
) -> Result:
    sparsity = summary.sparsity
    return Result(
        finish_reason=_reason(finished),
        prompt_tokens=summary.usage.prompt_tokens,
        completion_tokens=summary.usage.completion_tokens,
        queue_seconds=summary.timings.queue_seconds,
        ttft_seconds=summary.timings.ttft_seconds,
        decode_seconds=summary.timings.decode_seconds,
        policy=pb.SparsityPolicy.Name(sparsity.policy).removeprefix("SPARSITY_POLICY_").lower(),
        density=sparsity.density,
        core_share=_optional(sparsity, "core_share"),
        mlp_bytes_per_token=sparsity.mlp_bytes_per_token,
        bytes_per_token=sparsity.bytes_per_token,
        refreshes=sparsity.refreshes,
        drafted_tokens=sparsity.drafted_tokens,
        accepted_tokens=sparsity.accepted_tokens,
        predicted_kl=_optional(sparsity, "predicted_kl"),
        coverage=_optional(sparsity, "coverage"),
        stable=_optional(sparsity, "stable"),
        fallbacks=sparsity.fallbacks,
        dense_share=sparsity.dense_share,
        stop=_stop(finished),
        cached_tokens=summary.usage.cached_tokens,
        stop_token_id=_stop_token_id(finished),
        request_id=request_id,
    )


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


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
