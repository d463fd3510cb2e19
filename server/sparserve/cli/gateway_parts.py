"""What `sparserve gateway` starts: the commands, and how it sees that each is ready."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sparse_kernels._abi import SK_BLOCK_SIZE as BLOCK_SIZE
from sparserve.config import EngineSettings

WORKER_URL_SCHEME = "grpc://"
_PROBE_SECONDS = 2.0


class Balancing(StrEnum):
    """smg's policies that need nothing from the client."""

    CACHE_AWARE = "cache_aware"
    LEAST_LOAD = "least_load"
    POWER_OF_TWO = "power_of_two"
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"
    PREFIX_HASH = "prefix_hash"


@dataclass(frozen=True)
class Front:
    """Where smg listens, and how it chooses a worker."""

    host: str
    port: int
    metrics_port: int
    balancing: Balancing
    flags: Sequence[str]  # more of its own
    drain_timeout: float

    @property
    def base_url(self) -> str:
        reached = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{reached}]' if ':' in reached else reached}:{self.port}"

    def command(self, worker_urls: Sequence[str]) -> list[str]:
        """Workers are looked after every few seconds, so that one which was started again has work soon."""
        options = {
            "--host": self.host,
            "--port": self.port,
            "--policy": self.balancing.value,
            "--prometheus-host": "127.0.0.1",
            "--prometheus-port": self.metrics_port,
            # A chat template's first words are every prompt's: whoever has more than others to do is passed
            # over for them from the first request on, which smg's own 64 of difference would not see to here.
            "--cache-threshold": 0.5,
            "--balance-abs-threshold": 1,
            "--balance-rel-threshold": 1.1,
            "--block-size": BLOCK_SIZE,
            "--worker-startup-check-interval": 1,
            "--health-check-interval-secs": 2,
            "--health-check-timeout-secs": 2,
            "--health-failure-threshold": 2,
            "--health-success-threshold": 1,
            "--cb-timeout-duration-secs": 5,
            "--load-monitor-interval": 2,
            "--shutdown-grace-period-secs": max(1, round(self.drain_timeout)),
            "--log-level": "error",
        }
        flags = [str(part) for option in options.items() for part in option]
        return [sys.executable, "-m", "smg", "launch", *flags, "--worker-urls", *worker_urls, *self.flags]  # fmt: skip


@dataclass(frozen=True)
class Worker:
    """A server to start, on ports of its own that it keeps when it is started again."""

    name: str
    port: int  # of the adapter
    own_port: int
    metrics_port: int
    flags: Sequence[str]

    @classmethod
    def plan(cls, settings: EngineSettings, workers: int) -> list[Worker]:
        """So many, no two on the same port."""
        ports, flags = _free_ports(3 * workers), _worker_flags(settings, workers)
        return [
            cls(f"worker {number}", port, own_port, metrics_port, flags)
            for number in range(workers)
            for port, own_port, metrics_port in [ports[3 * number : 3 * number + 3]]
        ]

    @property
    def url(self) -> str:
        return f"{WORKER_URL_SCHEME}127.0.0.1:{self.port}"

    @property
    def command(self) -> list[str]:
        options = {
            "--adapters": "vllm",
            "--adapters-host": "127.0.0.1",
            "--adapters-port": self.port,
            "--host": "127.0.0.1",
            "--port": self.own_port,
            "--metrics-port": self.metrics_port,
        }
        flags = [str(part) for option in options.items() for part in option]
        quiet = [] if "SPARSERVE_LOG_LEVEL" in os.environ else ["--log-level", "warning"]
        return [sys.executable, "-m", "sparserve.cli", "serve", *flags, *quiet, *self.flags]


def _worker_flags(settings: EngineSettings, workers: int) -> list[str]:
    """What was given, and of CPUs and memory a share."""
    from sparse_kernels.native import memory_room, usable_cpus

    flags = []
    for name in sorted(settings.model_fields_set - {"threads"}):
        value = getattr(settings, name)
        if isinstance(value, bool):
            flags.append(flag(name) if value else flag(f"no_{name}"))
        else:
            flags += [flag(name), str(value)]
    flags += ["--threads", str(settings.threads or max(1, usable_cpus() // workers))]
    has_gpu = settings.device.startswith("cuda") or os.path.exists("/dev/nvidiactl")
    if not settings.kv_cache_gib and not has_gpu:
        # Each would take a quarter of the free memory, all at the same time.
        flags += ["--kv-cache-gib", f"{memory_room() / (1 << 30) / 2 / max(workers, 2):.2f}"]
    return flags


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [own.getsockname()[1] for own in sockets]


async def worker_is_ready(port: int) -> bool:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            told = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_PROBE_SECONDS
            )
        except grpc.aio.AioRpcError:
            return False
    return bool(told.status == health_pb2.HealthCheckResponse.SERVING)


async def smg_is_ready(front: Front, workers: int) -> bool:
    """It has all workers, and their tokenizer."""
    told = await asyncio.to_thread(get_json, f"{front.base_url}/readiness")
    return told is not None and told.get("healthy_workers", 0) >= workers


def get_json(url: str) -> dict[str, Any] | None:
    """None where nobody answers with JSON."""
    try:
        with urllib.request.urlopen(url, timeout=_PROBE_SECONDS) as response:
            content: dict[str, Any] = json.load(response)
            return content
    except (OSError, ValueError):
        return None
