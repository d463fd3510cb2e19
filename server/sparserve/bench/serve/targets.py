"""Servers under load: ours over gRPC. Each writes what it hears into a `Record`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tokenizers import Tokenizer

from sparserve.bench.serve.datasets import Prompt, Vocabulary
from sparserve.bench.serve.records import Record, Sparsity
from sparserve.client import AsyncClient, CallFailed, InvalidRequest, Result
from sparserve.client.connection import Security
from sparserve.errors import ConfigError, SparserveError

CONNECT_TIMEOUT = 60.0  # seconds


class Failed(SparserveError):
    """A request did not succeed; `status` is one of few."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


@dataclass(frozen=True, slots=True)
class Wish:
    """What every request asks for beside its prompt."""

    stop_at_eos: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)  # of our own protocol; None: left out


class Target(Protocol):
    name: str
    address: str
    pids: Sequence[int]  # its processes, where known

    @property
    def counted_by(self) -> str:
        """Who says how many tokens an answer has."""

    @property
    def model(self) -> str:
        """What answers; known once it is open."""

    async def open(self) -> None:
        """Connect, on the loop that requests are sent from. Raises ConfigError."""

    async def close(self) -> None: ...

    async def ask(self, prompt: Prompt, record: Record) -> None:
        """Send a request and listen to the end. Raises Failed."""


class Sparserve:
    """One server of ours or several, which take requests in turn, each over a channel of its own."""

    counted_by = "the server"

    def __init__(
        self,
        addresses: Sequence[str],
        wish: Wish,
        pids: Sequence[int] = (),
        security: Security | None = None,
    ) -> None:
        self.name, self.address, self.pids = "sparserve", ",".join(addresses), pids
        self._addresses = addresses
        self._security: Security = security or {}
        self._fields = {
            "temperature": 0,
            "ignore_eos": not wish.stop_at_eos,
            "token_ids": True,  # a piece says how many tokens it has
            **{name: value for name, value in wish.fields.items() if value is not None},
        }
        self._clients: list[AsyncClient] = []
        self.model = ""

    async def open(self) -> None:
        # Without pools of their own, channels to the same address would share a connection.
        options = {"grpc.use_local_subchannel_pool": 1}
        self._clients = [
            AsyncClient(address, options=options, **self._security) for address in self._addresses
        ]
        self._turns = itertools.cycle(self._clients)
        try:
            info = await self._clients[0].model_info(timeout=CONNECT_TIMEOUT)
        except CallFailed as error:
            await self.close()
            raise ConfigError(f"{self.name} at {self.address} does not answer: {error}") from error
        self.model = f"{info.model}, {info.dtype}"

    async def close(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients))
        self._clients = []

    async def ask(self, prompt: Prompt, record: Record) -> None:
        client = next(self._turns)
        try:
            stream = client.stream(prompt.prompt, max_tokens=prompt.output_tokens, **self._fields)
            async for delta in stream:
                if delta.tokens:
                    record.hear(len(delta.tokens))
                if delta.result is not None:
                    _note(delta.result, record)
        except CallFailed as error:
            raise Failed(error.code, error.message) from error
        except InvalidRequest as error:  # never sent
            raise Failed("INVALID_REQUEST", str(error)) from error

    async def vocabulary(self) -> Vocabulary:
        """Raises CallFailed, or ConfigError where the server's tokenizer cannot be read."""
        client = self._clients[0]
        info = await client.model_info(timeout=CONNECT_TIMEOUT)
        files = await client.tokenizer_files(timeout=CONNECT_TIMEOUT)
        try:
            tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"the tokenizer of {self.address} cannot be read: {error}") from error
        return Vocabulary.of(tokenizer, info.vocab_size, info.max_context_length)


def _note(result: Result, record: Record) -> None:
    record.prompt_tokens = result.prompt_tokens
    record.completion_tokens = result.completion_tokens
    record.sparsity = Sparsity(
        result.policy,
        result.density,
        result.bytes_per_token,
        result.dense_share,
        result.drafted_tokens,
        result.accepted_tokens,
        result.predicted_kl,
    )
