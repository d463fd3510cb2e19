"""Triton's own client against the adapter kserve."""

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from google.protobuf import descriptor_pool

from sparserve.api.server import Server
from sparserve.client import AsyncClient
from sparserve.protocols import kserve_pb2

PATIENCE = 60.0
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="session")
def triton() -> Any:
    """`tritonclient.grpc`. Its messages have the names of ours, so they get a pool of descriptors of their own."""
    pool = descriptor_pool.DescriptorPool()
    with patch.object(descriptor_pool, "Default", lambda: pool):
        return pytest.importorskip("tritonclient.grpc")


@pytest.fixture
async def server(serving) -> AsyncIterator[Server]:
    async with serving(adapters="kserve", adapters_port=0) as running:
        yield running


@pytest.fixture
def slow(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A step takes 10 ms; the steps so far."""
    backend: Any = server.engine.engine.backend
    real, steps = backend.forward, []

    def forward(batch: object) -> object:
        steps.append(batch)
        time.sleep(0.01)
        return real(batch)

    monkeypatch.setattr(backend, "forward", forward)
    return steps


class Streaming:
    """Calls of a client with a stream, in a thread; what its callback got."""

    def __init__(self, triton: Any, client: Any) -> None:
        self.triton, self.client = triton, client
        self.got: list[tuple[str, str, bool]] = []  # request id, text, whether it was the last
        self.errors: list[str] = []
        self._changed = threading.Condition()

    def callback(self, result: Any, error: Any) -> None:
        with self._changed:
            if error is not None:
                self.errors.append(error.message())
            else:
                response = result.get_response()
                text = result.as_numpy("text_output")
                last = response.parameters["triton_final_response"].bool_param
                self.got.append((response.id, "" if text is None else text[0].decode(), last))
            self._changed.notify()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE)

    def finals(self) -> list[str]:
        return [name for name, _, last in self.got if last]

    def text_of(self, request_id: str) -> str:
        return "".join(text for name, text, _ in self.got if name == request_id)


@pytest.fixture
def client(triton: Any, server: Server) -> Any:
    with triton.InferenceServerClient(f"127.0.0.1:{server.adapters_port}") as connected:
        yield connected


@pytest.fixture
def streaming(triton: Any, client: Any) -> Streaming:
    return Streaming(triton, client)


@pytest.fixture
def model(server: Server) -> str:
    return server.engine.engine.metrics.model_name


def inputs(triton: Any, text: str, *, stream: bool, tokens: int, **parameters: object) -> list[Any]:
    sampling = json.dumps({**GREEDY, "max_tokens": tokens, **parameters})
    made = []
    for name, kind, value in (
        ("text_input", "BYTES", np.array([text.encode()], dtype=np.object_)),
        ("stream", "BOOL", np.array([stream])),
        ("sampling_parameters", "BYTES", np.array([sampling.encode()], dtype=np.object_)),
        ("exclude_input_in_output", "BOOL", np.array([True])),
    ):
        made.append(triton.InferInput(name, [1], kind))
        made[-1].set_data_from_numpy(value)
    return made


async def own_text(server: Server, text: str, tokens: int) -> str:
    async with AsyncClient(f"127.0.0.1:{server.port}") as own:
        return (await own.generate(text, max_tokens=tokens, **GREEDY)).text


def test_every_field_of_ours_is_one_of_theirs_with_number_and_type(triton):
    pool = triton.service_pb2.DESCRIPTOR.pool

    def check(own: Any) -> int:
        theirs = pool.FindMessageTypeByName(own.full_name)
        assert theirs is not own
        for field in own.fields:
            same = theirs.fields_by_name[field.name]
            kinds = [(f.number, f.type, f.is_repeated) for f in (field, same)]
            assert kinds[0] == kinds[1], field.full_name
        return len(own.fields) + sum(map(check, own.nested_types))

    assert sum(map(check, kserve_pb2.DESCRIPTOR.message_types_by_name.values())) > 90
    for name, enum in kserve_pb2.DESCRIPTOR.enum_types_by_name.items():
        theirs = pool.FindEnumTypeByName(f"inference.{name}").values_by_name
        assert {v.name: v.number for v in enum.values}.items() <= {
            v.name: v.number for v in theirs.values()
        }.items()
    for method in kserve_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        service = pool.FindServiceByName("inference.GRPCInferenceService")
        same = service.methods_by_name[method.name]
        assert method.input_type.full_name == same.input_type.full_name
        assert (method.client_streaming, method.server_streaming) == (
            same.client_streaming,
            same.server_streaming,
        )


async def test_server_and_model_introduce_themselves(client, model):
    def ask() -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(model)
        assert client.get_server_metadata().name == "sparserve"
        metadata = client.get_model_metadata(model, as_json=True)
        shapes = {t["name"]: (t["datatype"], t["shape"]) for t in metadata["inputs"]}
        assert shapes["text_input"] == ("BYTES", ["1"])
        assert shapes["stream"] == ("BOOL", ["1"])
        assert metadata["outputs"][0] == {
            "name": "text_output",
            "datatype": "BYTES",
            "shape": ["-1"],
        }
        config = client.get_model_config(model).config
        assert config.model_transaction_policy.decoupled
        assert (config.max_batch_size, len(config.input)) == (0, len(shapes))

    await asyncio.to_thread(ask)


async def test_infer_and_its_statistics(triton, client, server, model):
    def ask() -> tuple[str, Any]:
        made = inputs(triton, "hello", stream=False, tokens=8)
        wanted = [triton.InferRequestedOutput(n) for n in ("text_output", "num_output_tokens")]
        result = client.infer(model, made, outputs=wanted, request_id="mine")
        assert result.get_response().id == "mine"
        assert result.as_numpy("num_output_tokens").tolist() == [8]
        statistics = client.get_inference_statistics(model)
        return result.as_numpy("text_output")[0].decode(), statistics.model_stats[0]

    text, statistics = await asyncio.to_thread(ask)
    assert statistics.inference_count == 1
    assert statistics.inference_stats.success.count == 1
    assert statistics.inference_stats.compute_infer.ns > 0
    assert text == await own_text(server, "hello", 8)


@pytest.mark.parametrize("empty_final", [False, True])
async def test_two_requests_of_one_stream_come_interleaved(
    triton, streaming, server, model, slow, empty_final
):
    def ask() -> None:
        client = streaming.client
        client.start_stream(streaming.callback)
        for name, tokens in (("long", 40), ("short", 15)):
            client.async_stream_infer(
                model,
                inputs(triton, name, stream=True, tokens=tokens),
                request_id=name,
                enable_empty_final_response=empty_final,
            )
        streaming.wait(lambda: len(streaming.finals()) == 2)
        client.stop_stream()

    await asyncio.to_thread(ask)
    assert streaming.errors == []
    assert streaming.finals() == ["short", "long"]
    names = [name for name, _, _ in streaming.got]
    assert names.index("long") < names.index("short") < len(names) - 1 - names[::-1].index("long")
    for name, tokens in (("long", 40), ("short", 15)):
        assert streaming.text_of(name) == await own_text(server, name, tokens)


async def test_a_request_that_fails_is_told_and_its_stream_goes_on(triton, streaming, model):
    def ask() -> None:
        client = streaming.client
        client.start_stream(streaming.callback)
        bad = inputs(triton, "x", stream=True, tokens=8, temperature=7)
        client.async_stream_infer(model, bad)
        streaming.wait(lambda: streaming.errors != [])
        client.async_stream_infer(model, inputs(triton, "x", stream=False, tokens=8))
        streaming.wait(lambda: streaming.got != [])
        client.stop_stream()

    await asyncio.to_thread(ask)
    (error,) = streaming.errors
    assert error.startswith("INVALID_ARGUMENT")
    assert "temperature is 7; it must be in [0, 2]" in error
    assert [last for _, _, last in streaming.got] == [True]


async def test_cancelling_the_stream_frees_the_engine(triton, streaming, server, model, slow):
    def ask() -> None:
        client = streaming.client
        client.start_stream(streaming.callback)
        for _ in range(2):
            client.async_stream_infer(model, inputs(triton, "x", stream=True, tokens=400))
        streaming.wait(lambda: len(streaming.got) > 4)
        client.stop_stream(cancel_requests=True)

    await asyncio.to_thread(ask)
    begun = time.monotonic()
    while server.engine.engine.used_blocks or server.engine.in_flight:
        assert time.monotonic() - begun < PATIENCE
        await asyncio.sleep(0.005)
    assert len(slow) < 300  # to their ends they take 400


async def test_the_example_of_the_documentation_runs(server):
    text = (Path(__file__).parents[2] / "docs" / "kserve.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert "127.0.0.1:50061" in code
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code.replace("50061", str(server.adapters_port)),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, errors = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 0, errors.decode()
    assert out.decode().startswith("Once upon a time")
