"""The line that every call leaves in the log, and the trace that it belongs to."""

import asyncio
import io
import json
import logging
import re
import string
import time
from contextlib import asynccontextmanager, suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from sparserve.api.interceptors import AccessLogInterceptor, caller_span
from sparserve.client import make_request
from sparserve.logs import current_call, make_handler
from sparserve.v1 import inference_pb2 as pb

GREEDY = {"temperature": 0.0, "ignore_eos": True}
TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
GENERATE = "/sparserve.v1.InferenceService/Generate"


@pytest.fixture
def log(caplog):
    """`log()`: every line logged so far, at INFO and above."""
    caplog.set_level(logging.INFO)
    stream = io.StringIO()
    handler, root = make_handler("json", stream), logging.getLogger()
    root.addHandler(handler)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.removeHandler(handler)


@pytest.fixture
def access(log, until):
    """`await access(count)`: that many lines of calls, once they are there."""

    async def lines(count: int = 1) -> list[dict]:
        def found() -> list[dict]:
            return [line for line in log() if line["logger"] == "sparserve.access"]

        await until(lambda: len(found()) >= count, "the access log")
        assert len(found()) == count
        return found()

    return lines


async def test_a_call_leaves_one_line_with_status_time_tokens_and_trace(wire, access):
    request = make_request("hello", request_id="r1", max_tokens=4, **GREEDY)
    await wire.inference.Generate(request, metadata=[("traceparent", TRACEPARENT)])
    (line,) = await access()
    assert line.pop("timestamp")
    assert line.pop("duration_ms") > line.pop("ttft_ms") > 0
    assert re.fullmatch(r"ipv4:127\.0\.0\.1:\d+", line.pop("peer"))
    assert line == {
        "level": "INFO", "logger": "sparserve.access", "message": "call ended", "method": GENERATE,
        "code": "OK", "request_id": "r1", "prompt_tokens": 5, "completion_tokens": 4,
        "trace_id": TRACE_ID, "span_id": SPAN_ID, "cached_tokens": 0, "finish_reason": "length",
        "policy": "dense", "density": 1.0,
    }  # fmt: skip


async def test_the_line_tells_the_policy_and_what_its_choices_read(wire, access):
    fields = {"max_tokens": 4, "ignore_eos": True, "n": 2, "policy": "core", "density": 0.5}
    await wire.inference.Generate(make_request("hello there", **fields))
    (line,) = await access()
    assert (line["policy"], line["density"]) == ("core", 0.5)


async def test_a_stream_leaves_one_line_and_a_request_gets_its_id_there(wire, access):
    call = wire.inference.GenerateStream(make_request("hello", max_tokens=6, **GREEDY))
    events = [event async for event in call]
    (line,) = await access()
    assert line["method"] == "/sparserve.v1.InferenceService/GenerateStream"
    assert (line["code"], line["completion_tokens"]) == ("OK", 6)
    assert line["request_id"] == events[0].started.request_id
    assert "trace_id" not in line


async def test_a_refused_call_is_logged_with_its_status_and_what_it_said_of_itself(wire, access):
    with pytest.raises(grpc.aio.AioRpcError):
        await wire.inference.Generate(make_request("hello", request_id="r1", max_tokens=0))
    with pytest.raises(grpc.aio.AioRpcError):
        await wire.inference.Embed(pb.EmbedRequest())
    refused, unknown = await access(2)
    assert (refused["code"], refused["request_id"]) == ("INVALID_ARGUMENT", "r1")
    assert "prompt_tokens" not in refused
    assert unknown["code"] == "UNIMPLEMENTED"


async def test_a_call_for_a_user_names_it_whatever_comes_of_it(wire, access):
    request = make_request("hello", max_tokens=1)
    request.user = "ann"
    with suppress(grpc.aio.AioRpcError):
        await wire.inference.Generate(request)
    (line,) = await access()
    assert line["user"] == "ann"


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_call_that_its_client_cancels_is_logged_as_cancelled(
    server, wire, access, controlled, until, streamed
):
    method = wire.inference.GenerateStream if streamed else wire.inference.Generate
    with controlled(server) as forward:
        forward.seconds = 0.005
        call = method(make_request("hello", max_tokens=400, **GREEDY))
        sent = asyncio.ensure_future(call.read() if streamed else call)
        await until(lambda: forward.calls >= 5)
        call.cancel()
        (line,) = await access()
        await asyncio.gather(sent, return_exceptions=True)
    assert line["code"] == "CANCELLED"
    assert 0 < line["completion_tokens"] < 400


@asynccontextmanager
async def serving_method(handler):
    """A channel to a server of one method, `/test.Test/Method`, behind the access log alone."""
    server = grpc.aio.server(interceptors=[AccessLogInterceptor()])
    methods = {"Method": handler}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


async def test_an_abort_that_comes_too_late_is_logged_with_its_status(access):
    async def late(request, context):
        time.sleep(
            context.time_remaining() + 0.05
        )  # the loop is busy: nobody is told that it passed
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "too late")

    async with serving_method(grpc.unary_unary_rpc_method_handler(late)) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/test.Test/Method")(b"", timeout=0.1)
        (line,) = await access()
    assert line["code"] == "DEADLINE_EXCEEDED"


async def test_a_stream_cancelled_while_it_waits_for_its_reader_is_logged_as_cancelled(access):
    sent = 0

    async def flood(request, context):
        nonlocal sent
        current_call().request_id = "r1"
        while True:
            yield bytes(1 << 20)
            sent += 1

    async with serving_method(grpc.unary_stream_rpc_method_handler(flood)) as channel:
        call = channel.unary_stream("/test.Test/Method")(b"")
        await call.read()
        before = -1
        while before != sent:  # until the connection takes no more
            before = sent
            await asyncio.sleep(0.1)
        call.cancel()
        (line,) = await access()
    assert (line["code"], line["request_id"]) == ("CANCELLED", "r1")


async def test_a_call_that_runs_out_of_time_is_logged_so(server, wire, access, controlled):
    with controlled(server) as forward:
        forward.seconds = 0.02
        with pytest.raises(grpc.aio.AioRpcError):
            await wire.inference.Generate(make_request("hi", max_tokens=400, **GREEDY), timeout=0.3)
        (line,) = await access()
    assert line["code"] == "DEADLINE_EXCEEDED"


async def test_probes_and_reflection_leave_a_line_at_debug_only(wire, access, caplog):
    async def ask() -> None:
        await wire.health.Check(health_pb2.HealthCheckRequest())
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        reflection = reflection_pb2_grpc.ServerReflectionStub(wire.channel)
        assert [answer async for answer in reflection.ServerReflectionInfo(iter([question]))]

    await ask()
    await wire.inference.Generate(make_request("hello", max_tokens=1, **GREEDY))
    (line,) = await access()
    assert line["method"] == GENERATE
    caplog.set_level(logging.DEBUG)
    await ask()
    _, *lines = await access(3)
    assert [(line["method"], line["level"], line["code"]) for line in lines] == [
        ("/grpc.health.v1.Health/Check", "DEBUG", "OK"),
        ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "DEBUG", "OK"),
    ]


async def test_neither_prompt_nor_output_is_logged(wire, access, log, caplog):
    caplog.set_level(logging.DEBUG)
    secret = "the cat is called Zerubbabel"
    request = make_request(secret, max_tokens=30, stop=["Zerub"], **GREEDY)
    answer = await wire.inference.Generate(request)
    with pytest.raises(grpc.aio.AioRpcError):
        await wire.inference.Generate(make_request(secret * 100))
    await access(2)
    text = answer.choices[0].text
    lines = [*map(json.dumps, log()), *(r.getMessage() for r in caplog.records)]
    assert lines
    assert not [line for line in lines if "Zerub" in line or text in line]


async def test_other_lines_of_a_call_name_its_trace_and_request(server, wire, log, monkeypatch):
    def broken() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(server.engine, "check_room", broken)
    with pytest.raises(grpc.aio.AioRpcError):
        await wire.inference.Generate(
            make_request("hello", request_id="r1"), metadata=[("traceparent", TRACEPARENT)]
        )
    (line,) = [line for line in log() if line["logger"] == "sparserve.api.status"]
    assert (line["trace_id"], line["span_id"]) == (TRACE_ID, SPAN_ID)
    assert line["request_id"] == "r1"


async def test_calls_that_overlap_are_told_apart(server, wire, access, controlled, until):
    ids = [f"r{i}" for i in range(6)]
    with controlled(server) as forward:
        forward.hold()
        calls = [
            asyncio.ensure_future(
                wire.inference.Generate(
                    make_request("hello", request_id=id, max_tokens=i + 1, **GREEDY),
                    metadata=[("traceparent", f"00-{i + 1:032x}-{i + 1:016x}-00")],
                )
            )
            for i, id in enumerate(ids)
        ]
        await until(lambda: server.engine.in_flight == len(ids))
    await asyncio.gather(*calls)
    for line in await access(len(ids)):
        number = int(line["trace_id"], 16)
        assert line["request_id"] == f"r{number - 1}"
        assert line["completion_tokens"] == number


async def test_what_a_client_says_of_itself_is_cut(wire, access):
    with pytest.raises(grpc.aio.AioRpcError):
        await wire.inference.Generate(make_request("hello", request_id="x" * 10_000))
    (line,) = await access()
    assert line["request_id"] == "x" * 256


HEX = "0123456789abcdef"
PARTS = st.one_of(
    st.tuples(*(st.text(HEX, min_size=n, max_size=n) for n in (2, 32, 16, 2))).map("-".join),
    st.text(HEX + "-AG ", max_size=60),
    st.just(TRACEPARENT).flatmap(
        lambda good: st.tuples(st.integers(0, len(good)), st.text(string.printable, max_size=2)).map(
            lambda cut: good[: cut[0]] + cut[1] + good[cut[0] + 1 :]
        )
    ),
)  # fmt: skip


def valid_trace_id(header: str) -> str | None:
    """W3C Trace Context, section 3.2.2, by hand."""
    fields = header.strip(" \t").split("-")
    if [len(field) for field in fields[:4]] != [2, 32, 16, 2]:
        return None
    version, trace_id, span_id, flags = fields[:4]
    if not set(version + trace_id + span_id + flags) <= set(HEX) or version == "ff":
        return None
    if version == "00" and len(fields) > 4:
        return None
    return trace_id if trace_id.strip("0") and span_id.strip("0") else None


@given(PARTS)
def test_a_traceparent_is_taken_where_it_is_valid_and_ignored_elsewhere(header):
    span = caller_span([("traceparent", header), ("tracestate", "a=1")])
    expected = valid_trace_id(header)
    assert span.is_valid == (expected is not None)
    assert f"{span.trace_id:032x}" == (expected or "0" * 32)


def test_tracestate_is_kept_and_a_malformed_one_alone_is_dropped():
    good = caller_span([("traceparent", TRACEPARENT), ("tracestate", "a=1"), ("tracestate", "b=2")])
    assert dict(good.trace_state) == {"a": "1", "b": "2"}
    bad = caller_span([("traceparent", TRACEPARENT), ("tracestate", "=;,\x00")])
    assert f"{bad.trace_id:032x}" == TRACE_ID
    assert not bad.trace_state


def test_two_traceparents_are_none():
    twice = [("traceparent", TRACEPARENT), ("traceparent", TRACEPARENT)]
    assert not caller_span(twice).is_valid
    assert not caller_span([("tracestate", "a=1")]).is_valid
    assert not caller_span([("traceparent-bin", b"\xff")]).is_valid
