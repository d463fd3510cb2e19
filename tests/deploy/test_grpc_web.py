"""gRPC-Web through Envoy, by a plain HTTP/1.1 client; and who is in Envoy's rotation by health alone."""

import asyncio
import http.client

import grpc
import pytest
from grpc_health.v1 import health_pb2

from sparserve.client import make_request
from sparserve.v1 import inference_pb2, inference_pb2_grpc

TRAILERS = 0x80  # flag of a frame


def call(port: int, method: str, message, origin: str = "http://localhost:3000"):
    """-> (messages as bytes, trailers): what a browser's gRPC-Web library sends and reads."""
    payload = message.SerializeToString()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(
            "POST", f"/sparserve.v1.InferenceService/{method}",
            body=b"\0" + len(payload).to_bytes(4, "big") + payload,
            headers={"Content-Type": "application/grpc-web+proto", "X-Grpc-Web": "1", "Origin": origin},
        )  # fmt: skip
        response = connection.getresponse()
        assert response.status == 200
        headers, body = dict(response.getheaders()), response.read()
    finally:
        connection.close()
    messages, trailers = [], {k: v for k, v in headers.items() if k.startswith("grpc-")}
    while body:
        flag, size = body[0], int.from_bytes(body[1:5], "big")
        frame, body = body[5 : 5 + size], body[5 + size :]
        if flag & TRAILERS:
            lines = (line.split(":", 1) for line in frame.decode().splitlines())
            trailers |= {name.strip(): value.strip() for name, value in lines}
        else:
            messages.append(frame)
    return messages, trailers, headers


class At:
    def __init__(self, server):
        self.grpc, self.http = server.port, server.metrics_port


async def until_healthy(port: int):
    for _ in range(100):
        found = await asyncio.to_thread(
            call, port, "Tokenize", inference_pb2.TokenizeRequest(text="a")
        )
        if found[1]["grpc-status"] == "0":
            return
        await asyncio.sleep(0.1)
    pytest.fail("Envoy lets nothing through")


async def test_unary_calls_streams_and_errors_reach_a_browser(serving, balancer):
    async with serving() as server:
        port = await balancer("envoy", [At(server), At(server)])
        await until_healthy(port)
        ask = make_request("hello", max_tokens=5, temperature=0, ignore_eos=True)
        (body,), trailers, headers = await asyncio.to_thread(call, port, "Generate", ask)
        assert trailers["grpc-status"] == "0"
        whole = inference_pb2.GenerateResponse.FromString(body)
        assert whole.usage.completion_tokens == 5
        assert headers["access-control-allow-origin"] == "http://localhost:3000"
        assert "grpc-status" in headers["access-control-expose-headers"]

        bodies, trailers, _ = await asyncio.to_thread(call, port, "GenerateStream", ask)
        assert trailers["grpc-status"] == "0"
        events = [inference_pb2.GenerateStreamResponse.FromString(each) for each in bodies]
        assert events[0].WhichOneof("event") == "started"
        assert "".join(event.delta.text for event in events) == whole.choices[0].text
        assert events[-1].summary.usage.completion_tokens == 5

        wrong = inference_pb2.GenerateRequest()  # no prompt
        bodies, trailers, headers = await asyncio.to_thread(call, port, "Generate", wrong)
        assert bodies == []
        assert trailers["grpc-status"] == str(grpc.StatusCode.INVALID_ARGUMENT.value[0])
        _, _, headers = await asyncio.to_thread(
            call, port, "Generate", ask, "https://elsewhere.org"
        )
        assert "access-control-allow-origin" not in headers


async def test_a_worker_that_says_not_serving_leaves_envoys_rotation(serving, balancer, channel):
    async with serving() as staying, serving() as leaving:
        port = await balancer("envoy", [At(staying), At(leaving)])
        await until_healthy(port)
        await asyncio.sleep(1.2)
        stub = inference_pb2_grpc.InferenceServiceStub(channel(f"127.0.0.1:{port}"))

        async def ask(times: int) -> list[int]:
            """How many each server answered."""
            servers, ask = (staying, leaving), make_request("hello", max_tokens=1)
            before = [answers(server) for server in servers]
            await asyncio.gather(*(stub.Generate(ask) for _ in range(times)))
            return [answers(s) - b for s, b in zip(servers, before, strict=True)]

        assert min(await ask(12)) >= 1
        # Health alone: it would still answer.
        leaving._health.set(health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.sleep(2.5)
        assert await ask(12) == [12, 0]
        leaving._health.set(health_pb2.HealthCheckResponse.SERVING)
        await asyncio.sleep(2.5)
        assert min(await ask(12)) >= 1


def answers(server) -> float:
    """Requests that this server answered to their end, by length or by the model's own."""
    sample = server.engine.engine.metrics.registry.get_sample_value
    return sum(
        sample("sparserve_requests_finished_total", {"reason": r}) for r in ("length", "stop_eos")
    )
