"""Command-line clients that know a server by its reflection alone."""

import asyncio
import base64
import json
import shutil
import sysconfig
from collections.abc import AsyncIterator

import pytest

from sparserve.api.server import Server

PATIENCE = 60.0
SCRIPTS = sysconfig.get_path("scripts")
GRPCURL, BUF = shutil.which("grpcurl", path=SCRIPTS), shutil.which("buf", path=SCRIPTS)
KSERVE, INFERENCE = "inference.GRPCInferenceService", "vllm.Inference"


@pytest.fixture
async def server(serving) -> AsyncIterator[Server]:
    async with serving(adapters="kserve,vllm-inference", adapters_port=0) as running:
        yield running


async def output(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 0, errors.decode()
    return out.decode()


async def grpcurl(port: int, what: str, data: dict | None = None) -> str:
    flags = ["-plaintext", *(["-d", json.dumps(data)] if data is not None else [])]
    return await output(str(GRPCURL), *flags, f"127.0.0.1:{port}", *what.split())


async def buf_curl(port: int, method: str, data: dict) -> str:
    return await output(
        str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge",
        "--data", json.dumps(data), f"http://127.0.0.1:{port}/{method}",
    )  # fmt: skip


def infer(text: str) -> dict:
    def tensor(name: str, data: bytes) -> dict:
        contents = {"bytesContents": [base64.b64encode(data).decode()]}
        return {"name": name, "datatype": "BYTES", "shape": [1], "contents": contents}

    sampling = b'{"temperature": 0, "max_tokens": 6, "ignore_eos": true}'
    return {
        "inputs": [tensor("text_input", text.encode()), tensor("sampling_parameters", sampling)]
    }


def objects(text: str) -> list[dict]:
    """One JSON object after the other."""
    found, decoder = [], json.JSONDecoder()
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


GENERATE = {"text": "hello", "stopping": {"maxTokens": 6, "ignoreEos": True}}
VLLM_GENERATE = {"text": "hello", "stopping": {"maxNewTokens": 6, "ignoreEos": True}}


@pytest.mark.skipif(GRPCURL is None, reason="grpcurl is not installed")
async def test_grpcurl_lists_describes_and_calls(server):
    own, adapters = server.port, server.adapters_port
    assert {"sparserve.v1.ControlService", "sparserve.v1.InferenceService"} <= set(
        (await grpcurl(own, "list")).split()
    )
    assert {KSERVE, INFERENCE, "vllm.Control", "grpc.health.v1.Health"} <= set(
        (await grpcurl(adapters, "list")).split()
    )
    assert KSERVE not in await grpcurl(own, "list")
    unary = json.loads(await grpcurl(own, "sparserve.v1.InferenceService/Generate", GENERATE))
    assert unary["usage"]["completion_tokens"] == 6
    stream = objects(await grpcurl(own, "sparserve.v1.InferenceService/GenerateStream", GENERATE))
    assert [*stream[0], *stream[-1]] == ["started", "summary"]
    answer = json.loads(await grpcurl(adapters, f"{KSERVE}/ModelInfer", infer("hello")))
    (text,) = answer["outputs"][0]["contents"]["bytes_contents"]
    assert base64.b64decode(text).startswith(b"hello")
    pieces = objects(await grpcurl(adapters, f"{INFERENCE}/GenerateStream", VLLM_GENERATE))
    assert sum(piece["outputs"].get("num_tokens", 0) for piece in pieces) == 6
    assert "rpc ModelStreamInfer ( stream" in await grpcurl(adapters, f"describe {KSERVE}")


@pytest.mark.skipif(BUF is None, reason="buf is not installed")
async def test_buf_curl_calls_every_kind_of_method(server):
    port = server.adapters_port
    answer = json.loads(await buf_curl(port, f"{KSERVE}/ModelInfer", infer("hello")))
    (text,) = answer["outputs"][0]["contents"]["bytesContents"]
    assert base64.b64decode(text).startswith(b"hello")
    (streamed,) = objects(await buf_curl(port, f"{KSERVE}/ModelStreamInfer", infer("hello")))
    assert streamed["inferResponse"]["outputs"] == answer["outputs"]
    pieces = objects(await buf_curl(port, f"{INFERENCE}/GenerateStream", VLLM_GENERATE))
    assert sum(piece["outputs"].get("numTokens", 0) for piece in pieces) == 6
    info = json.loads(await buf_curl(port, "vllm.Control/GetModelInfo", {}))
    assert info["supportsTextInput"] is True
