"""`sparserve serve` as a process: start, signals, exit status, errors."""

import asyncio
import contextlib
import signal
import socket
import time
import urllib.request

import pytest

from sparserve.api.addresses import check_addresses, is_loopback
from sparserve.api.server import addresses
from sparserve.client import AsyncClient
from sparserve.config import ServerSettings
from sparserve.errors import CallFailed, ConfigError

ANY_PORTS = ("--port", "0", "--metrics-port", "0")
SMALL = ("--threads", "1", "--kv-cache-gib", "0.05")
ENDLESS = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 60_000}


async def closed(port: int) -> None:
    """Until nothing listens on the port any more."""
    with contextlib.suppress(ConnectionRefusedError):
        while True:
            with contextlib.suppress(ConnectionResetError):  # it closes at this moment
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
            await asyncio.sleep(0.01)


async def test_sigterm_lets_a_stream_finish_refuses_new_calls_and_exits_0(
    spawn, long_folder, tmp_path
):
    """Also where each setting of a real process comes from: flag, environment, file, default."""
    (tmp_path / "settings.yaml").write_text("max_waiting: 5\nmax_running: 3\nport: 1\n")
    served = await spawn(
        "serve", "--model", long_folder, "--config", tmp_path / "settings.yaml", *ANY_PORTS, *SMALL,
        env={"SPARSERVE_MAX_WAITING": "7", "SPARSERVE_METRICS_PORT": "2"},
    )  # fmt: skip
    await served.ready()
    url = f"http://127.0.0.1:{served.metrics_port}/readyz"
    assert (await asyncio.to_thread(urllib.request.urlopen, url)).read() == b"ok\n"
    async with (
        AsyncClient(f"127.0.0.1:{served.port}") as client,
        # By another name, or gRPC would let it share the connection.
        AsyncClient(f"localhost:{served.port}") as late,
    ):
        limits = await client.server_info()
        assert (limits.limits.max_waiting_requests, limits.limits.max_running_requests) == (7, 3)
        assert limits.limits.default_max_tokens == 256
        pieces = client.stream("hello", **{**ENDLESS, "max_tokens": 1500})
        await anext(pieces)
        served.signal(signal.SIGTERM)
        while "draining" not in await served.line():
            pass
        await closed(served.port)
        with pytest.raises(CallFailed) as refused:
            await late.generate("hello", max_tokens=1)
        assert refused.value.code == "UNAVAILABLE"
        results = [piece.result async for piece in pieces]
        assert results[-1].finish_reason == "LENGTH"
        assert results[-1].completion_tokens == 1500
    assert await served.ended() == 0
    assert not [line for line in served.lines if "Traceback" in line or "ERROR" in line]


async def test_the_drain_timeout_bounds_a_stream_that_would_go_on(spawn, long_folder):
    served = await spawn(
        "serve", "--model", long_folder, "--drain-timeout", "0.5", *ANY_PORTS, *SMALL
    )
    await served.ready()
    async with AsyncClient(f"127.0.0.1:{served.port}") as client:
        pieces = client.stream("hello", **ENDLESS)
        await anext(pieces)
        begun = time.monotonic()
        served.signal(signal.SIGTERM)
        with pytest.raises(CallFailed) as failed:
            async for _ in pieces:
                pass
        assert time.monotonic() - begun >= 0.5
        assert failed.value.code == "UNAVAILABLE"
        assert failed.value.retry_after == 1.0
        assert await served.ended(within=30) == 0  # all of it takes minutes
    assert any("drain timed out after 0.5 s with 1 requests" in line for line in served.lines)


async def test_a_second_signal_stops_without_waiting(spawn, long_folder):
    served = await spawn(
        "serve", "--model", long_folder, "--drain-timeout", "1000", *ANY_PORTS, *SMALL
    )
    await served.ready()
    async with AsyncClient(f"127.0.0.1:{served.port}") as client:
        pieces = client.stream("hello", **ENDLESS)
        await anext(pieces)
        served.signal(signal.SIGINT)
        while "draining" not in await served.line():
            pass
        served.signal(signal.SIGINT)
        with pytest.raises(CallFailed):
            async for _ in pieces:
                pass
        assert await served.ended() == 0
    assert not [line for line in served.lines if "Traceback" in line]


# As process 1 of a container it has no default for SIGTERM.
LOADS_FOR_EVER = """
import signal, sys, time
from sparserve.cli import main
from sparserve.engine import factory

def build_engine(*_, **__):
    print("loading", file=sys.stderr, flush=True)
    time.sleep(1000)

factory.build_engine = build_engine
signal.signal(signal.SIGTERM, signal.SIG_IGN)
main()
"""


async def test_sigterm_ends_a_server_that_still_loads_its_model(spawn_python, tiny_folder):
    served = await spawn_python(LOADS_FOR_EVER, "serve", "--model", tiny_folder, *ANY_PORTS)
    while await served.line() != "loading":
        pass
    served.signal(signal.SIGTERM)
    assert await served.ended() == 128 + signal.SIGTERM


# A server whose fifth forward finds the GPU lost: two warm up, three generate.
LOSES_ITS_GPU = """
import sys
from sparse_kernels._abi import sk_status
from sparse_kernels.native import DeviceLost
from sparserve.cli import main
from sparserve.model.native import NativeBackend

real, calls = NativeBackend.forward, []

def forward(self, batch):
    calls.append(batch)
    if len(calls) > 5:
        raise DeviceLost(sk_status.SK_STATUS_DEVICE, "GPU 0 failed: an illegal address")
    return real(self, batch)

NativeBackend.forward = forward
main()
"""


async def test_a_lost_gpu_ends_the_process_with_status_1(spawn_python, tiny_folder):
    served = await spawn_python(
        LOSES_ITS_GPU, "serve", "--model", tiny_folder, "--backend", "cpu", *ANY_PORTS, *SMALL
    )
    await served.ready()
    async with AsyncClient(f"127.0.0.1:{served.port}") as client:
        with pytest.raises(CallFailed) as failed:
            async for _ in client.stream("hello", **{**ENDLESS, "max_tokens": 100}):
                pass
    assert failed.value.code == "UNAVAILABLE"
    assert "the GPU failed" in failed.value.message
    assert await served.ended(within=30) == 1
    assert any("an illegal address" in line for line in served.lines)


def told(lines: list[str]) -> list[str]:
    """What stderr says, less the log."""
    return [line for line in lines if line and " INFO " not in line]


@pytest.mark.parametrize("taken", ["port", "metrics-port"])
async def test_a_port_in_use_is_one_clear_line_and_exit_status_1(spawn, tiny_folder, taken):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        served = await spawn(
            "serve", "--model", tiny_folder, *ANY_PORTS, *SMALL, f"--{taken}", port
        )
        assert await served.ended() == 1
    (line,) = told(served.lines)
    assert not [line for line in served.lines if "parameters" in line], "the model was loaded first"
    assert line.startswith(f"error: cannot listen on 127.0.0.1:{port} for ")
    assert "Address already in use" in line
    assert f"choose another --{taken}" in line


async def test_a_wrong_model_setting_or_file_is_one_clear_line_and_exit_status_1(spawn, tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text("prot: 50051\n")
    nowhere = tmp_path / ("far/" * 30) / "model"
    cases = [
        (("--model", nowhere), f"error: no model at '{nowhere}'"),
        (("--max-running", "lots"), "error: max_running is 'lots': "),
        (("--config", config), "error: prot is no setting"),
    ]
    processes = [await spawn("serve", *flags) for flags, _ in cases]
    for served, (_, expected) in zip(processes, cases, strict=True):
        assert await served.ended() == 1
        (line,) = told(served.lines)
        assert line.startswith(expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--port", "70000"], "port is '70000'"),
        (["--dtype", "int7"], "dtype is 'int7'"),
        (["--backend", "gpu"], "backend is 'gpu'"),
        (["--device", "gpu"], "device is 'gpu': it must be auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:9999"], "the cuda backend cannot be used: "),
        (["--device", "cuda", "--backend", "cpu"], "backend is cpu and device is cuda; give one"),
        (["--backend", "cpu", "--dtype", "float32"], "dtype is float32 and it needs bfloat16"),
        (["--kv-cache-gib", "inf"], "kv_cache_gib is 'inf'"),
        (["--config", "/none.yaml"], "/none.yaml does not exist"),
        (["--max-context", "513"], "max_context 513 is beyond the model's own limit of 512"),
        (["--max-context", "1"], "max_context is 1"),
        (["--kv-cache-gib", "1e-6"], "raise --kv-cache-gib or lower --max-context"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
    ],
)
def test_settings_that_cannot_work_are_told_in_one_line(run_main, tiny_folder, flags, expected):
    status, _, err = run_main("serve", "--model", tiny_folder, *ANY_PORTS, *SMALL, *flags)
    assert status == 1
    (line,) = told(err.splitlines())
    assert line.startswith("error: ")
    assert expected in line


# What the text of a setting must say so that nobody has to guess its unit.
UNITS = {
    "max_context": "Tokens", "kv_cache_gib": "GiB", "max_running": "Requests",
    "max_batched_tokens": "Tokens", "default_max_tokens": "tokens", "threads": "threads",
    "max_waiting": "Requests", "max_message_mib": "MiB", "max_connection_age": "Seconds",
    "drain_timeout": "Seconds", "drain_delay": "Seconds",
}  # fmt: skip


@pytest.mark.parametrize("columns", ["80", "200"])
def test_help_names_unit_default_and_variable_of_every_setting(run_main, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    status, out, _ = run_main("serve", "--help")
    assert status == 0
    # Each option's text stands in the last column, over several lines.
    texts: dict[str, str] = {}
    name = ""
    for line in out.splitlines():
        cells = line.strip("│ ").split()
        if line.startswith("│ --"):  # a text may begin a line with a flag as well
            name = cells[0]
        texts[name] = texts.get(name, "") + " " + " ".join(cells)
    for setting, field in ServerSettings.model_fields.items():
        text = texts[f"--{setting.replace('_', '-')}"]
        assert f"[default: {field.default}]" in text
        assert f"[env: SPARSERVE_{setting.upper()}]" in text
        assert UNITS.get(setting, "") in text
    assert "…" not in out


def test_only_addresses_of_this_machine_count_as_private():
    addresses = ["127.0.0.1", "127.9.9.9", "::1", "localhost", "0.0.0.0", "::", "10.0.0.1", "host"]
    assert [is_loopback(a) for a in addresses] == [True] * 4 + [False] * 4


def test_equal_ports_are_refused():
    with pytest.raises(ConfigError, match="both 4999"):
        check_addresses(addresses(ServerSettings(port=4999, metrics_port=4999)))


def test_adapters_are_kept_from_public_addresses_unless_told_otherwise():
    public = {"adapters": "vllm", "adapters_host": "0.0.0.0", "adapters_port": 0}
    with pytest.raises(ConfigError, match=r"--adapters-host 0\.0\.0\.0 .*--allow-public-adapters"):
        addresses(ServerSettings(**public))
    told = addresses(ServerSettings(**public, allow_public_adapters=True))
    assert [address.host for address in told] == ["127.0.0.1", "127.0.0.1", "0.0.0.0"]
