"""Our own system as clients see it: a server in a process of its own, streams over loopback gRPC."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from sparserve.bench.systems import Prompts, Run
from sparserve.client import AsyncClient
from sparserve.config import ServerSettings
from sparserve.errors import SparserveError
from sparserve.model.backend import BackendInfo

START_TIMEOUT = 600.0  # seconds; a large model is loaded meanwhile
END_TIMEOUT = 60.0


class ServerProcess:
    """A server in a process of its own, which ends with this one."""

    def __init__(self, settings: ServerSettings) -> None:
        """Raises SparserveError where the server does not start."""
        context = multiprocessing.get_context("spawn")  # a fork would copy our threads' locks
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(settings, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            if not self._pipe.poll(START_TIMEOUT):
                raise SparserveError(f"the server did not start within {START_TIMEOUT:g} s")
            told: int | str = self._pipe.recv()
            if isinstance(told, str):
                raise SparserveError(told)
            self.port = told
        except EOFError as error:
            raise SparserveError("the server ended before it listened; its log says why") from error

    @property
    def pid(self) -> int:
        assert self._process.pid is not None, "it was started"
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pipe.close()  # the server's sign to end
        self._process.join(END_TIMEOUT)
        if self._process.is_alive():
            self._process.kill()


class Served(ServerProcess):
    """A `System`. The server shares the CPUs with this process, which is its client."""

    name, policy = "sparserve, served", "dense"

    def __init__(self, settings: ServerSettings, info: BackendInfo) -> None:
        """`info` is that of the same model offline. Raises SparserveError where the server does not start."""
        self.format, self.weight_bytes = info.dtype, info.weight_bytes
        self.kv_bytes_per_token = info.kv_bytes_per_token
        super().__init__(settings)

    def run(self, prompts: Prompts, new_tokens: int) -> Run:
        """A stream for each prompt, all at once; greedy, exactly `new_tokens` each."""
        return asyncio.run(self._run(prompts, new_tokens))

    async def _run(self, prompts: Prompts, new_tokens: int) -> Run:
        async with AsyncClient(f"127.0.0.1:{self.port}") as client:

            async def stream(prompt: tuple[int, ...]) -> tuple[float, int]:
                """(when its first text came, how many tokens came)"""
                first, count = 0.0, 0
                async for delta in client.stream(
                    prompt, max_tokens=new_tokens, temperature=0, ignore_eos=True
                ):
                    if delta.text and not first:
                        first = time.perf_counter()
                    if delta.result is not None:
                        count = delta.result.completion_tokens
                return first, count

            start = time.perf_counter()
            streams = await asyncio.gather(*map(stream, prompts))
            total = time.perf_counter() - start
        made = sum(count for _, count in streams)
        if made != new_tokens * len(prompts):
            raise SparserveError(f"the server made {made} tokens, not what was asked for")
        return Run(max(first for first, _ in streams) - start, total, made, len(prompts))


def _serve(settings: ServerSettings, pipe: Connection) -> None:
    """Sends the port, then serves until the other end of `pipe` is closed; or sends why it cannot."""
    from sparserve.api.server import Server
    from sparserve.engine.factory import build_engine

    try:
        built = build_engine(settings)
    except SparserveError as error:
        pipe.send(str(error))
        return

    async def serve() -> None:
        server = Server(built.engine, built.model_name, settings)
        await server.start()
        pipe.send(server.port)
        await asyncio.get_running_loop().run_in_executor(None, _wait_for_end, pipe)
        await server.drain_and_stop()

    asyncio.run(serve())


def _wait_for_end(pipe: Connection) -> None:
    try:
        pipe.recv()
    except EOFError:
        return
