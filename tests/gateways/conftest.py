"""The gateway smg as a process, in front of servers of ours."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparserve.cli.gateway_parts import Balancing, Front

PATIENCE = 60.0  # seconds; only what is broken takes so long


@dataclass(frozen=True)
class Smg:
    base_url: str  # without /v1
    log: Path

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.base_url + path, timeout=PATIENCE) as response:
            return json.load(response)


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], list[int]]:
    def find(count: int) -> list[int]:
        with contextlib.ExitStack() as stack:
            sockets = [
                stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
            ]
            return [own.getsockname()[1] for own in sockets]

    return find


@pytest.fixture(scope="module")
def start_smg(
    free_ports: Callable[[int], list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Smg]]:
    """`start_smg(worker_urls, workers=…, …)`: as `sparserve gateway` starts it; waits until it has all workers.
    Killed with the module.
    """
    started = []

    def start(worker_urls: Sequence[str]) -> Smg:
        port, metrics_port = free_ports(2)
        front = Front("127.0.0.1", port, metrics_port, Balancing.CACHE_AWARE, (), 5.0)
        log = tmp_path_factory.mktemp("smg") / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                front.command(worker_urls),
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            )
        started.append(process)
        smg, give_up = Smg(front.base_url, log), time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError):
                if smg.get("/readiness")["healthy_workers"] == len(worker_urls):
                    return smg
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up, log.read_text()
            time.sleep(0.1)

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def long_folder(
    write_tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model with a context in which a stream goes on as long as a test needs."""
    folder = tmp_path_factory.mktemp("gateways") / "tiny-long"
    return write_tiny_checkpoint(folder, max_position_embeddings=16384)


@pytest.fixture(scope="session")
def until() -> Callable:
    """`await until(condition)`: for what changes in a server and sends no event."""

    async def poll(condition: Callable[[], bool], what: str = "the condition") -> None:
        give_up = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < give_up, f"{what} did not come true in {PATIENCE:g} s"
            await asyncio.sleep(0.005)

    return poll
