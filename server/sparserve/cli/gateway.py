"""`sparserve gateway`: workers of this machine, or of others, behind the OpenAI-compatible gateway smg."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shlex
import signal
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import Annotated

import typer

from sparserve.cli.gateway_parts import (
    WORKER_URL_SCHEME,
    Balancing,
    Front,
    Worker,
    flag,
    get_json,
    smg_is_ready,
    worker_is_ready,
)
from sparserve.cli.options import with_settings
from sparserve.cli.output import counting_bar, err, out, warn
from sparserve.cli.processes import Child
from sparserve.config import EngineSettings, ServerSettings, load_settings
from sparserve.errors import ConfigError

_END_SECONDS = 15.0  # beyond its drain timeout, for a program to end


@with_settings(EngineSettings)
def gateway(
    settings: EngineSettings,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Servers to start here, each with its share of CPUs.")
    ] = 2,
    worker_urls: Annotated[
        str,
        typer.Option(
            metavar="URL,…",
            help="Instead of starting any: servers that run already with --adapters vllm, as grpc://host:50061.",
        ),
    ] = "",
    host: Annotated[
        str, typer.Option(help="Address of the OpenAI-compatible HTTP API.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its port.")] = 30000,
    gateway_metrics_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the gateway's own Prometheus metrics.")
    ] = 29000,
    balancing: Annotated[
        Balancing,
        typer.Option(
            metavar="<choice>",
            help=f"How a worker is chosen, one of {', '.join(Balancing)}: cache_aware prefers the one that has a prompt's "
            "beginning in its cache.",
        ),
    ] = Balancing.CACHE_AWARE,
    smg_flags: Annotated[
        str,
        typer.Option(
            metavar="FLAGS",
            help="More flags for `smg launch`, as in --smg-flags '--tenant-api-key me:secret --log-level info'.",
        ),
    ] = "",
) -> None:
    """Serve the OpenAI API over HTTP: several servers of ours behind the gateway smg.

    Starts the workers (`sparserve serve --adapters vllm` on free ports of 127.0.0.1) and `smg launch` with the
    flags that fit them, waits until all are ready and prints a line to try. A worker or gateway that dies is
    started again. Ctrl-C or SIGTERM ends all in order: the gateway lets requests in flight finish, then the
    workers end; a second one ends everything at once.

    The flags of the engine below are for each worker. What else `sparserve serve` knows, workers take from
    SPARSERVE_… in the environment: SPARSERVE_LOG_LEVEL=info shows a line for each call.

    Needs the package smg: pip install 'sparserve[gateway]'.
    """
    if (
        importlib.util.find_spec("smg") is None
        or importlib.util.find_spec("smg_grpc_proto") is None
    ):
        raise ConfigError("the gateway is the package smg: pip install 'sparserve[gateway]'")
    _check_front(host, port, gateway_metrics_port)
    drain_timeout = load_settings(ServerSettings, {}).drain_timeout
    flags = _split(smg_flags)
    front = Front(host, port, gateway_metrics_port, balancing, flags, drain_timeout)
    urls = _given_urls(worker_urls)
    if urls and settings.model_fields_set:
        given = ", ".join(flag(name) for name in sorted(settings.model_fields_set))
        raise ConfigError(
            f"{given}: for workers started here; those of --worker-urls have their own"
        )
    if not urls:
        _fetch_model(settings.model)
    plans = [] if urls else Worker.plan(settings, workers)
    asyncio.run(_Gateway(front, plans, urls or [plan.url for plan in plans]).run())


class _Gateway:
    """Runs it all once."""

    def __init__(self, front: Front, workers: Sequence[Worker], urls: Sequence[str]) -> None:
        self._front = front
        self._urls = urls
        self._workers = [
            Child(plan.name, plan.command, partial(worker_is_ready, plan.port)) for plan in workers
        ]
        self._smg = Child(
            "smg", front.command(urls), partial(smg_is_ready, front, len(urls)), _is_no_picture
        )
        self._asked, self._impatient = asyncio.Event(), asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None  # of one of the programs

    async def run(self) -> None:
        """Raises ChildFailed where one of the programs cannot be kept running."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            try:
                if await self._unless_asked(self._start()):
                    await self._announce()
                    await self._unless_asked(asyncio.Event().wait())
            finally:
                await self._unless_impatient(self._end())
        finally:
            for child in (self._smg, *self._workers):
                child.kill()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def _start(self) -> None:
        with counting_bar() as show:
            show("starting workers", 0, len(self._workers))
            self._run(*self._workers)
            for done, worker in enumerate(self._workers, 1):
                await worker.ready()
                show("starting workers", done, len(self._workers))
            # It would look for workers that are not there yet only once in a while.
            show("starting the gateway", 0, 0)
            self._run(self._smg)
            await self._smg.ready()

    def _run(self, *children: Child) -> None:
        for child in children:
            task = asyncio.create_task(child.run())
            task.add_done_callback(self._on_end)
            self._running.add(task)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._failure = self._failure or failure
            self._asked.set()

    async def _unless_asked(self, work: Awaitable[object]) -> bool:
        """Whether `work` was done before a signal came. Raises ChildFailed where a program fails first."""
        task = asyncio.ensure_future(work)
        asked = asyncio.create_task(self._asked.wait())
        await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if self._failure is not None:
            task.cancel()
            raise self._failure
        if not task.done():
            task.cancel()
            return False
        await task  # raises what it raised
        return True

    async def _end(self) -> None:
        err.print("ending: the gateway first, then its workers; again to end at once")
        patience = self._front.drain_timeout + _END_SECONDS
        await self._smg.stop(patience)
        await asyncio.gather(*(worker.stop(patience) for worker in self._workers))

    async def _unless_impatient(self, work: Awaitable[object]) -> None:
        task = asyncio.ensure_future(work)
        hurry = asyncio.create_task(self._impatient.wait())
        await asyncio.wait({task, hurry}, return_when=asyncio.FIRST_COMPLETED)
        for each in (task, hurry):
            each.cancel()

    def _on_signal(self) -> None:
        (self._impatient if self._asked.is_set() else self._asked).set()

    async def _announce(self) -> None:
        front = self._front
        listed = await asyncio.to_thread(get_json, f"{front.base_url}/v1/models")
        model = listed["data"][0]["id"] if listed else ""
        err.print(f"ready: {model}, workers {len(self._urls)}, balancing {front.balancing.value}")
        err.print(f"gateway: metrics http://127.0.0.1:{front.metrics_port}/metrics")
        out.print(f"OpenAI base URL: {front.base_url}/v1", soft_wrap=True)
        body = {"model": model, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
        out.print(
            f"curl {front.base_url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'",
            markup=False,
            soft_wrap=True,
        )


def _is_no_picture(line: str) -> bool:
    """smg begins with its emblem, in Braille."""
    return bool(line) and not any("\u2800" <= character <= "\u28ff" for character in line)


def _check_front(host: str, port: int, metrics_port: int) -> None:
    """Raises ConfigError where the gateway could not listen there."""
    from sparserve.api.addresses import Address, check_addresses, is_loopback

    check_addresses(
        [
            Address(host, port, "the gateway", "--port"),
            Address("127.0.0.1", metrics_port, "its metrics", "--gateway-metrics-port"),
        ]
    )
    if not is_loopback(host):
        warn(
            f"{host} is open to the network, and smg asks for no key: whoever reaches it can generate, and add "
            "workers of their own; see --tenant-api-key and --control-plane-api-keys of `smg launch` (--smg-flags)"
        )


def _split(smg_flags: str) -> list[str]:
    """Raises ConfigError, also of flags without which this command does not find smg."""
    try:
        flags = shlex.split(smg_flags)
    except ValueError as error:
        raise ConfigError(f"--smg-flags cannot be split into flags: {error}") from error
    ours = {
        "--host": "--host",
        "--port": "--port",
        "--prometheus-port": "--gateway-metrics-port",
        "--worker-urls": "--worker-urls",
    }
    for given in flags:
        if own := ours.get(given.partition("=")[0]):
            raise ConfigError(f"--smg-flags has {given}; use {own} of `sparserve gateway`")
    return flags


def _given_urls(text: str) -> list[str]:
    urls = [url for part in text.split(",") if (url := part.strip())]
    for url in urls:
        if not url.startswith(WORKER_URL_SCHEME):
            raise ConfigError(
                f"--worker-urls has {url!r}; a worker is grpc://host:port, the port of its --adapters-port"
            )
    return urls


def _fetch_model(name: str) -> None:
    """Once, where it is one that is downloaded: all workers would do it."""
    from sparserve.model.catalog import CATALOG, fetch

    if name in CATALOG:
        with counting_bar() as show:
            fetch(name, show)
