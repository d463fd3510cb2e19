"""`vllm.grpc.engine.VllmEngine` on a server of a test's own."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc

from sparserve.api.server import Server

# "hello, world" to the tiny tokenizer; test modules cannot import this one
HELLO = (71, 68, 75, 75, 78, 11, 220, 86, 78, 81, 75, 67)


@dataclass
class Peer:
    """A server with the adapter, and the stub that calls it."""

    server: Server
    stub: Any
    channel: Any

    @staticmethod
    def request_of(
        ids: tuple[int, ...] = HELLO, *, stream: bool = False, request_id: str = "", **params: Any
    ) -> pb.GenerateRequest:
        greedy = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 8}
        return pb.GenerateRequest(
            request_id=request_id,
            tokenized=pb.TokenizedInput(input_ids=ids),
            sampling_params=pb.SamplingParams(**{**greedy, **params}),
            stream=stream,
        )

    async def generate(self, request: pb.GenerateRequest) -> list[Any]:
        """What `request` was answered with, each a chunk or a complete."""
        answers = [answer async for answer in self.stub.Generate(request)]
        return [getattr(answer, answer.WhichOneof("response")) for answer in answers]

    async def complete(self, **fields: Any) -> Any:
        (answer,) = await self.generate(self.request_of(**fields))
        return answer


@pytest.fixture
async def peers(serving) -> AsyncIterator[Any]:
    """`await peers(max_running=…, …)`: a Peer; all end with the test."""
    open_now = []

    async def start(**settings: Any) -> Peer:
        context = serving(adapters="vllm", adapters_port=0, **settings)
        server = await context.__aenter__()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.adapters_port}")
        open_now.append((context, channel))
        return Peer(server, vllm_engine_pb2_grpc.VllmEngineStub(channel), channel)

    yield start
    for context, channel in reversed(open_now):
        await channel.close()
        await context.__aexit__(None, None, None)


@pytest.fixture
async def peer(peers) -> Peer:
    return await peers()
