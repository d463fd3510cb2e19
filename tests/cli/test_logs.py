"""What `sparserve serve` writes to stderr."""

import json
import signal

import grpc

from sparserve.client import make_request
from sparserve.v1 import inference_pb2_grpc

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


async def test_json_lines_from_start_to_end_and_nothing_of_prompts(spawn, tiny_folder):
    served = await spawn(
        "serve", "--model", tiny_folder, "--port", "0", "--metrics-port", "0", "--threads", "1",
        "--kv-cache-gib", "0.05", env={"SPARSERVE_LOG_FORMAT": "json", "SPARSERVE_LOG_LEVEL": "debug"},
    )  # fmt: skip
    await served.ready()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as channel:
        await inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            make_request("Zerubbabel", request_id="r1\nforged", max_tokens=2, ignore_eos=True),
            metadata=[("traceparent", f"00-{TRACE_ID}-00f067aa0ba902b7-01")],
        )
    served.signal(signal.SIGTERM)
    assert await served.ended() == 0
    entries = [json.loads(line) for line in served.lines]
    assert any(entry["message"].startswith("serving ") for entry in entries)
    (call,) = [entry for entry in entries if entry["logger"] == "sparserve.access"]
    assert (call["code"], call["request_id"]) == ("OK", "r1\nforged")
    assert (call["trace_id"], call["completion_tokens"]) == (TRACE_ID, 2)
    assert any("draining" in entry["message"] for entry in entries)
    assert not [line for line in served.lines if "Zerubbabel" in line]
