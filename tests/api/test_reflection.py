"""Server reflection and a client that nobody here wrote."""

import asyncio
import json
import shutil

import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

INFERENCE, CONTROL = "sparserve.v1.InferenceService", "sparserve.v1.ControlService"


@pytest.fixture
def reflect(wire):
    """Ask one version of the reflection service several questions over one stream."""

    async def ask(version: str, *questions: dict) -> list[ServerReflectionResponse]:
        # Both versions have the same messages.
        method = wire.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=ServerReflectionRequest.SerializeToString,
            response_deserializer=ServerReflectionResponse.FromString,
        )
        return [answer async for answer in method(ServerReflectionRequest(**q) for q in questions)]

    return ask


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_and_describes_both_services(reflect, version):
    listed, *described = await reflect(
        version,
        {"list_services": ""},
        {"file_containing_symbol": INFERENCE},
        {"file_containing_symbol": CONTROL},
    )
    names = {service.name for service in listed.list_services_response.service}
    assert {INFERENCE, CONTROL, "grpc.health.v1.Health"} <= names
    methods = {}
    for answer in described:
        for raw in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(raw)
            for service in file.service:
                methods[f"{file.package}.{service.name}"] = {m.name for m in service.method}
    assert methods[INFERENCE] == {
        "Generate", "GenerateStream", "Chat", "ChatStream", "Tokenize", "Detokenize", "Embed",
    }  # fmt: skip
    assert methods[CONTROL] == {
        "ListModels", "GetModelInfo", "GetServerInfo", "GetLoad", "Abort", "GetTokenizer", "Drain",
        "LoadAdapter", "UnloadAdapter",
    }  # fmt: skip


@pytest.mark.skipif(shutil.which("buf") is None, reason="buf is not on the PATH")
async def test_buf_curl_generates_by_reflection(server):
    async def curl(method: str, data: dict) -> str:
        process = await asyncio.create_subprocess_exec(
            "buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge",
            "--data", json.dumps(data), f"http://127.0.0.1:{server.port}/{method}",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0, err.decode()
        return out.decode()

    request = {"text": "hello", "stopping": {"maxTokens": 4, "ignoreEos": True}}
    unary = json.loads(await curl(f"{INFERENCE}/Generate", request))
    assert unary["usage"] == {"promptTokens": 5, "completionTokens": 4}
    assert unary["choices"][0]["finished"]["reason"] == "FINISH_REASON_LENGTH"
    stream = await curl(f"{INFERENCE}/GenerateStream", request)
    assert stream.index('"started"') < stream.index('"finished"') < stream.index('"summary"')
    assert json.loads(await curl(f"{CONTROL}/GetModelInfo", {}))["vocabSize"] == 259
