"""Any server with OpenAI's completions over HTTP, such as llama-server, vLLM or a gateway, as a target."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from sparserve.bench.peers.packages import require
from sparserve.bench.serve.datasets import Prompt
from sparserve.bench.serve.records import Record
from sparserve.bench.serve.targets import Failed, Wish
from sparserve.errors import ConfigError

DONE = "[DONE]"
LONGEST_MESSAGE = 200  # characters of an error that are kept


class OpenAi:
    """Streams of /v1/completions. Tokens are those of the `usage` that the server sends last; where it sends none,
    a chunk counts as a token.
    """

    def __init__(
        self, name: str, url: str, wish: Wish, model: str | None = None, pids: Sequence[int] = ()
    ) -> None:
        """Raises ConfigError of what is no address."""
        self._http = require("httpx2")
        try:
            parsed = self._http.URL(url)
        except self._http.InvalidURL as error:
            raise ConfigError(f"{url!r} is no address: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"{url!r} is no address such as http://127.0.0.1:8000")
        self.name, self.address, self.pids = name, url.rstrip("/").removesuffix("/v1"), pids
        self._wish, self.model = wish, model or ""
        self._with_usage = self._without_usage = 0

    @property
    def counted_by(self) -> str:
        if not self._without_usage:
            return "the server's usage"
        return "chunks" if not self._with_usage else "the server's usage or chunks"

    async def open(self) -> None:
        limits = self._http.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = self._http.AsyncClient(
            base_url=self.address, timeout=None, limits=limits, trust_env=False
        )
        try:
            self.model = self.model or await self._first_model()
        except ConfigError:
            await self.close()
            raise

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, prompt: Prompt, record: Record) -> None:
        body = {
            "model": self.model,
            "prompt": prompt.prompt,
            "max_tokens": prompt.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": not self._wish.stop_at_eos,
        }
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    raise Failed(f"HTTP {response.status_code}", text[:LONGEST_MESSAGE])
                await self._listen(response, record)
        except self._http.HTTPError as error:
            raise Failed(type(error).__name__, str(error)[:LONGEST_MESSAGE]) from error

    async def _listen(self, response: Any, record: Record) -> None:
        done = False
        async for line in _lines(response):
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip().decode(errors="replace")
            if data == DONE:
                done = True
                continue
            chunk = _chunk(data)
            if _carries_token(chunk):
                record.hear(1)
            if usage := chunk.get("usage"):
                _note(usage, record)
        if not done:
            raise Failed("INCOMPLETE", "the stream ended without [DONE]")
        if record.completion_tokens is None:
            self._without_usage += 1
        else:
            self._with_usage += 1

    async def _first_model(self) -> str:
        """Raises ConfigError."""
        try:
            answer = await self._client.get("/v1/models", timeout=60)
            answer.raise_for_status()
            return str(answer.json()["data"][0]["id"])
        except (self._http.HTTPError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{self.address}/v1/models names no model: {error!r}") from error


async def _lines(response: Any) -> AsyncIterator[bytes]:
    """Lines of an event stream end at LF or CRLF alone; httpx's own end at U+2028 too, which a token may have."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
    yield rest


def _chunk(data: str) -> dict[str, Any]:
    """Raises Failed."""
    try:
        found = json.loads(data)
    except ValueError as error:
        raise Failed("BAD_CHUNK", data[:LONGEST_MESSAGE]) from error
    if not isinstance(found, dict):
        raise Failed("BAD_CHUNK", data[:LONGEST_MESSAGE])
    if "error" in found:
        raise Failed("ERROR_EVENT", str(found["error"])[:LONGEST_MESSAGE])
    return found


def _note(usage: Any, record: Record) -> None:
    """Raises Failed."""
    try:
        record.prompt_tokens = int(usage["prompt_tokens"])
        record.completion_tokens = int(usage["completion_tokens"])
    except (LookupError, ValueError, TypeError) as error:
        raise Failed("BAD_CHUNK", f"usage is {usage!r}"[:LONGEST_MESSAGE]) from error


def _carries_token(chunk: dict[str, Any]) -> bool:
    """The last chunk of a choice often has no text and only says why it ended; before it, one whose bytes are no whole
    character yet has none either.
    """
    choices = chunk.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return False
    return bool(choices[0].get("text")) or choices[0].get("finish_reason") is None
