"""The `sparserve` command: as a process of its own, and called in this one where that is enough."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

PATIENCE = 200.0  # seconds; a start takes three, on a very busy machine fifty
SERVING = re.compile(
    r"serving (\S+) on (\S+):(\d+) \(gRPC\), metrics on http://[^\s/]+:(\d+)/metrics"
)


@dataclass
class Served:
    """A running `sparserve serve`."""

    process: asyncio.subprocess.Process
    port: int = 0
    metrics_port: int = 0
    lines: list[str] = field(default_factory=list)  # of its stderr

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def ready(self) -> None:
        """Read stderr until the line that names the ports."""
        while line := await self.line():
            if found := SERVING.search(line):
                self.port, self.metrics_port = int(found[3]), int(found[4])
                return
        raise AssertionError("\n".join(["it ended without serving", *self.lines]))

    async def line(self) -> str:
        line = (await asyncio.wait_for(self.process.stderr.readline(), PATIENCE)).decode()
        self.lines.append(line.rstrip())
        return line.rstrip() or line

    async def ended(self, within: float = PATIENCE) -> int:
        """The exit status; what is left of stderr goes to `lines`."""
        _, rest = await asyncio.wait_for(self.process.communicate(), within)
        self.lines += rest.decode().splitlines()
        return self.process.returncode


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("SPARSERVE_"):
            monkeypatch.delenv(name)
    for name in ("COLUMNS", "FORCE_COLOR", "TERMINAL_WIDTH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
async def spawn_any() -> AsyncIterator[Callable[..., Awaitable[Served]]]:
    """`await spawn_any("program", "argument", …, env={…})`: killed at the end of the test."""
    started = []

    async def start(*command: str | Path, env: dict[str, str] | None = None) -> Served:
        process = await asyncio.create_subprocess_exec(
            *map(str, command),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **(env or {})},
        )
        started.append(process)
        return Served(process)

    yield start
    for process in started:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        await process.communicate()


@pytest.fixture
def spawn(spawn_any: Callable[..., Awaitable[Served]]) -> Callable[..., Awaitable[Served]]:
    """`await spawn("serve", …, env={…})`: the installed command."""
    return partial(spawn_any, Path(sysconfig.get_path("scripts")) / "sparserve")


@pytest.fixture
def spawn_python(
    spawn_any: Callable[..., Awaitable[Served]], tmp_path: Path
) -> Callable[..., Awaitable[Served]]:
    """`await spawn_python(code, "serve", …)`: code in place of the installed command."""

    def start(code: str, *arguments: str | Path) -> Awaitable[Served]:
        script = tmp_path / "own.py"
        script.write_text(code)
        return spawn_any(sys.executable, script, *arguments)

    return start


@pytest.fixture
def run_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`run_main("models", "list")` -> (exit status, stdout, stderr), in this process."""
    from sparserve.cli import main

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sparserve", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def until() -> Callable[..., Awaitable[None]]:
    """`await until(condition)`: for what changes and sends no event."""

    async def poll(condition: Callable[[], bool]) -> None:
        give_up = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < give_up, "the condition did not come true"
            await asyncio.sleep(0.005)

    return poll


@pytest.fixture(scope="session")
def long_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context that takes it many seconds to fill."""
    folder = tmp_path_factory.mktemp("long") / "long-llama"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 65536
    (folder / "config.json").write_text(json.dumps(config))
    return folder
