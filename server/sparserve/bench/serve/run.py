"""The load generator: sends requests when they are due and notes when each piece of an answer comes.

A request's latency counts from when it was due, not from when it was sent: a server that stalls delays those that
should have come meanwhile, and leaving their wait out would hide the stall (coordinated omission).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass, replace

from sparserve.bench.machine import CpuWatch
from sparserve.bench.serve.datasets import Prompt, Prompts
from sparserve.bench.serve.load import Load
from sparserve.bench.serve.records import Record, Run
from sparserve.bench.serve.targets import Failed, Target
from sparserve.bench.serve.watch import LoopWatch, ProcessWatch

SHOW = 0.5  # seconds between two looks at the progress
TIMED_OUT = "TIMEOUT"
AFTER_FAILURE = 0.1  # seconds until a user asks again: a full server is not asked all the time


@dataclass(frozen=True, slots=True)
class Status:
    """How far a run is."""

    share: float  # of its requests or seconds
    running: int
    finished: int
    failed: int
    tokens_per_second: float  # since the last look


@dataclass(frozen=True, slots=True)
class Stage:
    """What one run sends."""

    load: Load
    prompts: Prompts
    first: int = 0  # number of its first prompt
    seed: tuple[int, ...] = (0,)
    timeout: float = 600.0  # seconds for each request, from when it was sent


async def run_load(
    target: Target, stage: Stage, on_status: Callable[[Status], None] = lambda status: None
) -> Run:
    """`target` is open. Ends when every request has been answered or has failed."""
    generator = _Generator(target, stage)
    watch = ProcessWatch(target.pids) if target.pids else None
    cpus = CpuWatch()
    loop_watch = LoopWatch()
    looks = [loop_watch.run(), generator.report(on_status), *([watch.run()] if watch else [])]
    async with _meanwhile(looks):
        cpu = time.process_time()
        await generator.run()
        cpu = time.process_time() - cpu
    usage, others = watch.usage() if watch else None, cpus.others()
    seconds = max((record.ended for record in generator.records), default=0.0)
    if usage is not None and seconds:
        usage = replace(usage, cpus_of_others=max(0.0, others - usage.cpu_seconds / seconds))
    return Run(generator.records, seconds, cpu, loop_watch.lags, usage)


async def warm_up(target: Target, prompts: Prompts, count: int, timeout: float) -> None:
    """One after another, not measured. Raises Failed where one fails."""
    for number in range(count):
        record = Record(0.0, time.perf_counter())
        try:
            async with asyncio.timeout(timeout):
                await target.ask(prompts(number), record)
        except TimeoutError as error:
            raise Failed(TIMED_OUT, f"no answer in {timeout:g} s") from error


@contextlib.asynccontextmanager
async def _meanwhile(coroutines: Iterable[Coroutine[None, None, None]]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error


class _Generator:
    def __init__(self, target: Target, stage: Stage) -> None:
        self.records: list[Record] = []
        self._target, self._stage, self._load = target, stage, stage.load
        self._running = self._finished = self._failed = 0
        limit = stage.load.max_concurrency
        self._slots = contextlib.nullcontext() if limit is None else asyncio.Semaphore(limit)
        self._next = 0
        self._schedule: list[float] = []
        self._made: list[Prompt] = []
        load = stage.load
        if not load.closed:
            times = load.arrivals.schedule(
                stage.seed, count=load.num_prompts, duration=load.duration
            )
            self._schedule = times.tolist()
        # Made before the clock runs, where their number is known.
        count = len(self._schedule) or load.num_prompts or 0
        self._made = [stage.prompts(stage.first + number) for number in range(count)]
        self._origin = time.perf_counter()

    async def run(self) -> None:
        self._origin = time.perf_counter()
        if self._load.closed:
            await self._run_users()
        else:
            await self._run_schedule()

    async def report(self, show: Callable[[Status], None]) -> None:
        """Until it is cancelled."""
        before, tokens = time.perf_counter(), 0
        while True:
            await asyncio.sleep(SHOW)
            now, heard = time.perf_counter(), self._heard
            speed = (heard - tokens) / (now - before)
            show(Status(self._share(), self._running, self._finished, self._failed, speed))
            before, tokens = now, heard

    async def _run_schedule(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number, due in enumerate(self._schedule):
                if (early := due - self._now()) > 0:
                    await asyncio.sleep(early)
                group.create_task(self._one(number, due))

    async def _run_users(self) -> None:
        assert self._load.max_concurrency is not None
        async with asyncio.TaskGroup() as group:
            for _ in range(self._load.max_concurrency):
                group.create_task(self._user())

    async def _user(self) -> None:
        while self._goes_on():
            number, self._next = self._next, self._next + 1
            if not await self._one(number, self._now()):
                await asyncio.sleep(AFTER_FAILURE)

    def _goes_on(self) -> bool:
        if self._load.duration is not None:
            return self._now() < self._load.duration
        return self._next < len(self._made)

    async def _one(self, number: int, due: float) -> bool:
        """-> whether it was answered."""
        record = Record(due, self._origin)
        self.records.append(record)
        prompt = self._prompt(number)
        async with self._slots:
            self._running += 1
            record.sent = record.now()
            await self._ask(prompt, record)
            record.ended = record.now()
            self._running -= 1
        self._finished += 1
        self._failed += bool(record.error)
        return not record.error

    async def _ask(self, prompt: Prompt, record: Record) -> None:
        try:
            async with asyncio.timeout(self._stage.timeout):
                await self._target.ask(prompt, record)
        except Failed as error:
            record.error, record.message = error.status, error.message
        except TimeoutError:
            record.error = TIMED_OUT
            record.message = f"no whole answer in {self._stage.timeout:g} s"

    def _prompt(self, number: int) -> Prompt:
        if number < len(self._made):
            return self._made[number]
        return self._stage.prompts(self._stage.first + number)

    def _now(self) -> float:
        return time.perf_counter() - self._origin

    def _share(self) -> float:
        if self._load.duration is not None:
            return min(1.0, self._now() / self._load.duration)
        return self._finished / max(1, len(self._made))

    @property
    def _heard(self) -> int:
        return sum(len(record.times) for record in self.records)
