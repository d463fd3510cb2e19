"""/metrics, /healthz and /readyz."""

import asyncio
import socket
import threading
from contextlib import ExitStack

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sparserve.api.http import MAX_CONNECTIONS
from sparserve.client import make_request
from sparserve.engine.request import GenerationRequest, SamplingParams, StoppingParams
from sparserve.metrics import PREFIX, TABLE
from sparserve.model.backend import BLOCK_SIZE
from sparserve.v1 import control_pb2

GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture
def scrape(http_get):
    """The value of every sample that /metrics shows now, by name and label value."""

    async def get(server) -> dict[str, float]:
        status, body = await http_get(server, "/metrics")
        assert status == 200
        return {
            "/".join(
                [sample.name, *(v for k, v in sample.labels.items() if k != "model_name")]
            ): sample.value
            for family in text_string_to_metric_families(body)
            for sample in family.samples
            if not sample.name.endswith("_bucket")
        }

    return get


async def test_every_metric_of_the_table_is_exported_under_its_name_and_kind(server, http_get):
    _, body = await http_get(server, "/metrics")
    families = {family.name: family for family in text_string_to_metric_families(body)}
    for spec in TABLE:
        family = families.pop(f"{PREFIX}_{spec.name}")
        assert family.type == spec.kind.__name__.lower()
        assert family.documentation == spec.help
    assert not families  # nothing that the table, so the documentation, does not know


async def test_vllms_names_are_shown_where_they_were_asked_for(serving, connect, http_get):
    async with serving(metrics_compat="vllm") as server:
        await connect(server).inference.Generate(make_request("hello", max_tokens=4, **GREEDY))
        _, body = await http_get(server, "/metrics")
        _, one = await http_get(server, "/metrics?name[]=vllm:generation_tokens_total")
    labels = 'engine="0",model_name="tiny-llama'
    (line,) = [x for x in one.splitlines() if not x.startswith("#")]
    assert line.startswith(f"vllm:generation_tokens_total{{{labels}")
    assert line.endswith(" 4.0")
    assert line in body
    assert "sparserve_generation_tokens_total{model_name=" in body


async def test_counters_advance_as_requests_run(server, wire, scrape):
    before = await scrape(server)
    for _ in range(3):
        await wire.inference.Generate(make_request("hello", max_tokens=4, **GREEDY))
    after = await scrape(server)

    def gained(name: str) -> float:
        return after[f"sparserve_{name}"] - before.get(f"sparserve_{name}", 0)

    assert gained("prompt_tokens_total") == 15
    assert gained("generation_tokens_total") == 12
    assert gained("requests_finished_total/length") == 3
    for histogram in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert gained(f"{histogram}_seconds_count") == 3
    assert gained("inter_token_latency_seconds_count") == 9
    assert gained("engine_step_seconds_count") == gained("iteration_tokens_total_count") == 12
    assert gained("iteration_tokens_total_sum") == 3 * (5 + 3)
    assert gained("time_to_first_token_seconds_sum") > 0
    assert after["sparserve_kv_blocks"] == server.engine.engine.backend.num_blocks


async def test_every_histogram_of_requests_counts_choices_or_requests(server, scrape):
    sampling = SamplingParams(temperature=0, n=3)
    stopping = StoppingParams(max_tokens=4, ignore_eos=True)
    for number in range(2):  # the second finds the first one's prompt in the prefix cache
        request = GenerationRequest(str(number), tuple(range(40)), sampling, stopping)
        with server.engine.submit(request) as stream:
            assert [update async for update in stream]
    now = await scrape(server)
    counts = {
        "request_queue_time_seconds": 2, "request_params_n": 2, "request_params_max_tokens": 2,
        "request_prompt_tokens": 2, "request_max_num_generation_tokens": 2,
        "request_prefill_kv_computed_tokens": 2, "time_to_first_token_seconds": 6,
        "inter_token_latency_seconds": 18, "request_time_per_output_token_seconds": 6,
        "e2e_request_latency_seconds": 6, "request_inference_time_seconds": 6,
        "request_prefill_time_seconds": 6, "request_decode_time_seconds": 6,
        "request_generation_tokens": 6,
    }  # fmt: skip
    for name, count in counts.items():
        assert now[f"sparserve_{name}_count"] == count, name
    cached = BLOCK_SIZE * (39 // BLOCK_SIZE)
    totals = {
        "request_params_n_sum": 6, "request_params_max_tokens_sum": 8, "request_prompt_tokens_sum": 80,
        "request_max_num_generation_tokens_sum": 8, "request_generation_tokens_sum": 24,
        "request_prefill_kv_computed_tokens_sum": 80 - cached, "prefix_cache_queries_total": 6 * cached,
        "prefix_cache_hits_total": 5 * cached, "prompt_tokens_cached_total": cached,
        "prompt_tokens_total": 80, "generation_tokens_total": 24,
    }  # fmt: skip
    for name, total in totals.items():
        assert now[f"sparserve_{name}"] == total, name
    assert now["sparserve_kv_cache_usage_perc"] == 0


async def test_finished_requests_are_counted_by_reason(serving, connect, scrape, controlled, until):
    async with serving(max_context=40) as server:
        wire = connect(server)
        await wire.inference.Generate(make_request("hello", max_tokens=100, **GREEDY))
        text = await wire.inference.Generate(make_request("hello", max_tokens=9, **GREEDY))
        stop = text.choices[0].text[:1]
        await wire.inference.Generate(make_request("hello", max_tokens=9, stop=[stop], **GREEDY))
        with controlled(server) as forward:
            forward.hold()
            call = wire.inference.GenerateStream(make_request("hello", request_id="a"))
            await until(lambda: forward.calls == 1)
            assert not call.done()
            await wire.control.Abort(control_pb2.AbortRequest(request_ids=["a"]))
        assert [event async for event in wire.inference.GenerateStream(make_request("x"))]
        await until(lambda: server.engine.in_flight == 0)
        with controlled(server) as forward:
            forward.fail(RuntimeError("broken"), times=1)
            with pytest.raises(grpc.aio.AioRpcError):
                await wire.inference.Generate(make_request("hello"))
        now = await scrape(server)
    reasons = ("context", "length", "stop_string", "cancelled", "error")
    counts = {reason: now[f"sparserve_requests_finished_total/{reason}"] for reason in reasons}
    assert counts["length"] == counts["stop_string"] == 1
    assert counts["cancelled"] == counts["error"] == 1
    assert now["sparserve_engine_step_failures_total"] == 1


async def test_refused_requests_are_counted_by_reason(serving, connect, scrape, controlled, until):
    async with serving(max_running=1, max_waiting=0) as server:
        wire = connect(server)

        async def refused(request) -> None:
            with pytest.raises(grpc.aio.AioRpcError):
                await wire.inference.Generate(request)

        await refused(make_request("hello", max_tokens=0))
        await refused(make_request("hello", model="another"))
        await refused(make_request(""))
        with controlled(server) as forward:
            forward.hold()
            call = asyncio.ensure_future(wire.inference.Generate(make_request("hi", max_tokens=2)))
            await until(lambda: forward.calls == 1)
            await refused(make_request("hello"))
            draining = asyncio.ensure_future(server.engine.drain(60))
            await asyncio.sleep(0)
            await refused(make_request("hello"))
            now = await scrape(server)
        await call
        await draining
    reasons = {"invalid": 3, "queue_full": 1, "unavailable": 1}
    for reason, count in reasons.items():
        assert now[f"sparserve_requests_rejected_total/{reason}"] == count


async def test_gauges_show_the_load_and_are_zero_again_after_it(
    serving, connect, scrape, controlled, until
):
    async with serving(max_running=2) as server:
        wire = connect(server)

        def start(letter: str) -> asyncio.Future:  # prompts that share no block
            request = make_request(letter * 40, max_tokens=5, **GREEDY)
            return asyncio.ensure_future(wire.inference.Generate(request))

        with controlled(server) as forward:
            forward.hold()
            calls = [start("a")]
            await until(lambda: forward.calls == 1)
            calls += [start(letter) for letter in "bcde"]
            await until(lambda: server.engine.in_flight == 5)
            for step in (2, 3):
                forward.allow_one()
                await until(lambda step=step: forward.calls == step)
            busy = await scrape(server)
        await asyncio.gather(*calls)
        idle = await scrape(server)
    gauges = ("num_requests_running", "num_requests_waiting", "kv_blocks_used")
    assert [busy[f"sparserve_{gauge}"] for gauge in gauges] == [2, 3, 6]
    assert busy["sparserve_kv_cache_usage_perc"] == 6 / busy["sparserve_kv_blocks"]
    assert [idle[f"sparserve_{gauge}"] for gauge in gauges] == [0, 0, 0]


async def test_gauges_are_zero_after_the_last_request_was_aborted(
    server, wire, scrape, controlled, until
):
    with controlled(server) as forward:
        forward.seconds = 0.005
        call = wire.inference.GenerateStream(
            make_request("hello", request_id="a", max_tokens=400, **GREEDY)
        )
        await until(lambda: forward.calls >= 3)
        await wire.control.Abort(control_pb2.AbortRequest(request_ids=["a"]))
        assert [event async for event in call]
    now = await scrape(server)
    assert server.engine.engine.used_blocks == 0
    assert now["sparserve_kv_blocks_used"] == 0
    assert now["sparserve_num_requests_running"] == 0


async def test_health_and_readiness_are_ok_and_other_paths_are_not_found(server, http_get):
    assert await http_get(server, "/healthz") == (200, "ok\n")
    assert await http_get(server, "/readyz") == (200, "ok\n")
    for path in ("/", "/metricsx", "/healthz/", "/../etc/passwd"):
        status, body = await http_get(server, path)
        assert status == 404
        assert "/metrics" in body


async def test_an_idle_connection_does_not_keep_the_probes_waiting(server, http_get):
    with (
        socket.create_connection(("127.0.0.1", server.metrics_port)),
        socket.create_connection(("127.0.0.1", server.metrics_port)) as half,
    ):
        half.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert await asyncio.wait_for(http_get(server, "/healthz"), 8) == (200, "ok\n")


async def test_idle_connections_give_way_and_hold_no_more_threads_than_allowed(server, http_get):
    def held() -> int:
        return sum("process_request_thread" in thread.name for thread in threading.enumerate())

    with ExitStack() as stack:
        address = ("127.0.0.1", server.metrics_port)
        idle = [
            stack.enter_context(socket.create_connection(address, timeout=8))
            for _ in range(3 * MAX_CONNECTIONS)
        ]
        assert await asyncio.wait_for(http_get(server, "/healthz"), 8) == (200, "ok\n")
        assert 0 < held() <= MAX_CONNECTIONS
        assert await asyncio.to_thread(idle[0].recv, 1) == b""  # the oldest was closed
        idle[-1].sendall(b"GET /readyz HTTP/1.1\r\n\r\n")  # the newest was not
        assert (await asyncio.to_thread(idle[-1].recv, 100)).startswith(b"HTTP/1.0 200")


async def test_probes_answer_while_a_step_runs(server, wire, http_get, controlled, until):
    with controlled(server) as forward:
        forward.hold()
        call = asyncio.ensure_future(wire.inference.Generate(make_request("hi", max_tokens=1)))
        await until(lambda: forward.calls == 1)
        assert (await http_get(server, "/healthz"))[0] == 200
        assert (await http_get(server, "/readyz"))[0] == 200
    await call
