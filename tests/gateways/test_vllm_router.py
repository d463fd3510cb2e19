"""vLLM's router, a program that turns OpenAI's HTTP API into calls of `vllm.Inference`."""

import asyncio
import json
import shutil
import socket
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sparserve.api.server import Server
from sparserve.client import AsyncClient
from sparserve.config import ServerSettings
from sparserve.engine.factory import assemble_engine

PATIENCE = 60.0
ROUTER = shutil.which("vllm-router", path=sysconfig.get_path("scripts"))
pytestmark = pytest.mark.skipif(ROUTER is None, reason="vllm-router is not installed")


@pytest.fixture
async def server(tiny_model, tiny_folder) -> AsyncIterator[Server]:
    settings = ServerSettings(
        model=str(tiny_folder),
        backend="reference",
        threads=1,
        kv_cache_gib=0.004,
        port=0,
        metrics_port=0,
        adapters="vllm-inference",
        adapters_port=0,
        drain_timeout=5,
    )
    built = assemble_engine(tiny_model, settings)
    running = Server(built.engine, built.model_name, settings)
    await running.start()
    yield running
    await running.drain_and_stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.fixture
async def router(server: Server) -> AsyncIterator[str]:
    """Its address, once it serves."""
    port, metrics = free_port(), free_port()
    process = await asyncio.create_subprocess_exec(
        str(ROUTER), "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics),
        "--worker-urls", f"grpc://127.0.0.1:{server.adapters_port}", "--policy", "round_robin",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    give_up = time.monotonic() + PATIENCE
    address = f"http://127.0.0.1:{port}"
    while not await asyncio.to_thread(is_ready, address):
        assert process.returncode is None
        assert time.monotonic() < give_up
        await asyncio.sleep(0.1)
    yield address
    process.terminate()
    await process.wait()


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/readiness", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def chat(model: Path, **fields: object) -> bytes:
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": str(model), "messages": messages, "temperature": 0, "max_tokens": 12}
    return json.dumps({**body, **fields}).encode()


async def post(address: str, body: bytes) -> str:
    def send() -> str:
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{address}/v1/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.read().decode()

    return await asyncio.to_thread(send)


async def test_chat_whole_and_as_server_sent_events(server, router, tiny_folder):
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        messages = [{"role": "user", "content": "hello"}]
        own = await client.chat(messages, temperature=0, max_tokens=12)
    whole = json.loads(await post(router, chat(tiny_folder)))
    (choice,) = whole["choices"]
    # A character that the last token leaves unfinished is told as U+FFFD there, and not at all by us.
    unfinished = "\N{REPLACEMENT CHARACTER}"
    assert choice["message"]["content"].rstrip(unfinished) == own.text.rstrip(unfinished)
    assert choice["finish_reason"] == "length"
    assert whole["usage"]["prompt_tokens"] == own.result.prompt_tokens
    assert whole["usage"]["completion_tokens"] == own.result.completion_tokens == 12
    lines = (await post(router, chat(tiny_folder, stream=True))).split("\n\n")
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event)["choices"] for event in events[:-1]]
    deltas = [choices[0]["delta"].get("content") or "" for choices in chunks if choices]
    assert len([text for text in deltas if text]) > 2
    assert "".join(deltas) == choice["message"]["content"]


async def test_a_request_that_cannot_work_keeps_its_status(router, tiny_folder):
    with pytest.raises(urllib.error.HTTPError) as refused:
        await post(router, chat(tiny_folder, presence_penalty=9))
    with refused.value as response:
        assert response.code == 400
        assert "presence_penalty is 9" in response.read().decode()


async def test_a_client_that_leaves_frees_the_engine(server, router, tiny_folder, monkeypatch):
    backend: Any = server.engine.engine.backend
    real, calls = backend.forward, []

    def forward(batch: object) -> object:
        calls.append(batch)
        time.sleep(0.01)
        return real(batch)

    monkeypatch.setattr(backend, "forward", forward)
    host, port = router.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = chat(tiny_folder, stream=True, max_tokens=400, ignore_eos=True)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await asyncio.wait_for(reader.readuntil(b"content"), PATIENCE)
    await asyncio.wait_for(reader.readuntil(b"data: "), PATIENCE)
    assert server.engine.in_flight == 1
    writer.close()
    begun = time.monotonic()
    while server.engine.in_flight or server.engine.engine.used_blocks:
        assert time.monotonic() - begun < PATIENCE
        await asyncio.sleep(0.005)
    assert len(calls) < 300
