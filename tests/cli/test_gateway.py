"""`sparserve gateway` as a process, with the workers and the gateway that it starts."""

import asyncio
import contextlib
import importlib.util
import json
import re
import signal
import socket
import time
import urllib.request

import openai
import psutil
import pytest

from sparserve.cli.gateway_parts import Worker
from sparserve.config import EngineSettings

PATIENCE = 120.0
SMALL = ("--threads", "1", "--kv-cache-gib", "0.05")
ENDLESS = {"temperature": 0.0, "extra_body": {"ignore_eos": True}, "stream": True}


def free_ports() -> tuple[str, ...]:
    """Flags that keep two tests apart."""
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        ports = [str(own.getsockname()[1]) for own in (one, other)]
    return "--port", ports[0], "--gateway-metrics-port", ports[1]


async def read_until(served, text: str) -> str:
    while text not in (line := await served.line()):
        assert line, "\n".join(["it ended", *served.lines])
    return line


def finished(metrics_url: str) -> float:
    """Choices that a worker has brought to an end."""
    with urllib.request.urlopen(metrics_url, timeout=PATIENCE) as response:
        text = response.read().decode()
    return sum(
        float(n) for n in re.findall(r"^sparserve_requests_finished_total\{.* (\S+)$", text, re.M)
    )


async def test_workers_share_the_load_one_that_dies_comes_back_and_the_end_is_orderly(
    spawn, long_folder
):
    served = await spawn("gateway", "--model", long_folder, *free_ports(), *SMALL)
    metrics = [
        (await read_until(served, "serving")).split("metrics on ")[1].split(",")[0]
        for _ in range(2)
    ]
    await read_until(served, "ready: ")
    told = (await served.process.stdout.readline()).decode()
    base_url = told.removeprefix("OpenAI base URL: ").strip()
    curl = (await served.process.stdout.readline()).decode()
    body = json.loads(curl.split("-d ")[1].strip().strip("'"))
    parent = psutil.Process(served.process.pid)
    children = parent.children()
    assert len(children) == 3

    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:

        async def chat(text: str, **options):
            body["messages"][0]["content"] = text
            return await asyncio.wait_for(
                client.chat.completions.create(**body, **options), PATIENCE
            )

        async def outcome(stream) -> str:
            with contextlib.suppress(openai.APIError):
                async for piece in stream:
                    if piece.choices and piece.choices[0].finish_reason:
                        return piece.choices[0].finish_reason
            return "error"

        await asyncio.gather(*(chat(f"{i} at once", max_tokens=32) for i in range(8)))
        assert all(finished(url) >= 2 for url in metrics)

        streams = [await chat(f"Stream {i}", max_tokens=6000, **ENDLESS) for i in range(4)]
        outcomes = [asyncio.create_task(outcome(stream)) for stream in streams]
        await asyncio.sleep(0.3)
        next(child for child in children if "serve" in child.cmdline()).kill()
        for number in range(8):
            assert (await chat(f"Still there? {number}", max_tokens=1)).choices
        ends = await asyncio.wait_for(asyncio.gather(*outcomes), PATIENCE)
        assert set(ends) == {"error", "length"}
        await read_until(served, "ended with status -9; starting it again")
        await read_until(served, "is ready again")

        last = await chat("To the end", max_tokens=3000, **ENDLESS)
        await anext(aiter(last))
        served.signal(signal.SIGTERM)
        assert await asyncio.wait_for(outcome(last), PATIENCE) == "length"
    assert await served.ended() == 0
    assert not any(child.is_running() for child in children)


async def test_servers_that_run_already_stay_and_a_second_signal_ends_the_rest_at_once(
    spawn, long_folder
):
    worker = await spawn(
        "serve", "--model", long_folder, "--port", "0", "--metrics-port", "0", "--adapters", "vllm",
        "--adapters-port", "0", *SMALL,
    )  # fmt: skip
    url = "grpc://" + (await read_until(worker, "serving")).split("vllm on ")[1]
    served = await spawn("gateway", "--worker-urls", url, *free_ports())
    await read_until(served, "ready: ")
    (child,) = psutil.Process(served.process.pid).children()
    begun = time.monotonic()
    served.signal(signal.SIGINT)
    await read_until(served, "ending: the gateway first")
    served.signal(signal.SIGINT)
    assert await served.ended() == 0
    assert (
        time.monotonic() - begun < 4
    )  # in order smg alone takes five, to close what listens to it
    assert not child.is_running()
    assert worker.process.returncode is None


async def test_a_worker_that_cannot_start_ends_it_and_says_why(spawn, tmp_path):
    served = await spawn(
        "gateway", "--workers", "1", "--model", tmp_path / "nothing", *free_ports()
    )
    assert await served.ended() == 1
    told = "\n".join(served.lines)
    assert re.search(r"worker 0 \| error: .*nothing", told)
    assert re.search(r"error: worker 0 ended with status 1 before it was ready", told)
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--worker-urls", "http://127.0.0.1:1"], "a worker is grpc://host:port"),
        (
            ["--worker-urls", "grpc://127.0.0.1:1", "--model", "x"],
            "--model: for workers started here",
        ),
        (["--smg-flags", "'open"], "--smg-flags cannot be split into flags: No closing quotation"),
        (["--smg-flags", "--port=1"], "--smg-flags has --port=1; use --port of"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1:30000 for the gateway"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(run_main, arguments, told):
    status, _, error = run_main("gateway", *arguments)
    assert status == 1
    assert told in error


def test_without_the_package_the_way_to_it_is_named(run_main, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, error = run_main("gateway")
    assert status == 1
    assert "pip install 'sparserve[gateway]'" in error


def test_a_worker_gets_the_flags_that_were_given_and_a_share_of_cpus_and_memory():
    given = EngineSettings.model_construct(
        {"dtype", "prefix_cache"},
        **{**EngineSettings().model_dump(), "dtype": "int8", "prefix_cache": False},
    )
    flags = list(Worker.plan(given, 64)[0].flags)
    assert flags[:3] == ["--dtype", "int8", "--no-prefix-cache"]
    assert flags[3:5] == ["--threads", "1"]
    assert flags[5] == "--kv-cache-gib"
    assert 0 < float(flags[6]) < 64


def test_no_two_workers_share_a_port():
    plans = Worker.plan(EngineSettings(), 64)
    ports = [port for own in plans for port in (own.port, own.own_port, own.metrics_port)]
    assert len(set(ports)) == 3 * 64
