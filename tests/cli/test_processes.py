"""Programs that a command runs beside itself, real ones of a few lines."""

import asyncio
import signal
import sys
import time

import psutil
import pytest

from sparserve.cli import processes
from sparserve.cli.processes import Child
from sparserve.errors import ChildFailed

FOREVER = "import time; print('here', flush=True); time.sleep(1000)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + FOREVER


def child(code: str, ready: bool = True) -> Child:
    async def is_ready() -> bool:
        return ready

    return Child("program", [sys.executable, "-c", code], is_ready)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_RESTART_SECONDS", 0.01)


async def test_one_that_ends_again_and_again_is_given_up(capsys):
    with pytest.raises(ChildFailed, match=r"ended 3 times within 30 s .* with status 7"):
        await child("import time; time.sleep(0.5); print('hello \\x1b[31mred'); exit(7)").run()
    told = capsys.readouterr().err
    assert told.count("program | hello red\n") == 3
    assert told.count("ended with status 7; starting it again") == 2


async def test_one_that_never_was_ready_is_not_started_again():
    with pytest.raises(ChildFailed, match="status 3 before it was ready"):
        await child("exit(3)", ready=False).run()


@pytest.mark.parametrize(("code", "least", "most"), [(FOREVER, 0, 5), (STUBBORN, 1, 10)])
async def test_stop_asks_first_and_kills_then(capsys, code, least, most):
    program = child(code)
    run = asyncio.create_task(program.run())
    await program.ready()
    while "here" not in (told := capsys.readouterr().err):
        await asyncio.sleep(0.01)
    begun = time.monotonic()
    await program.stop(1.0)
    await asyncio.wait_for(run, 60)
    assert least <= time.monotonic() - begun < most
    assert ("killing it" in told + capsys.readouterr().err) == (code == STUBBORN)
    await program.stop(1.0)  # again does nothing


async def test_a_line_without_end_ends_no_program(capsys):
    run = child("import sys; sys.stdout.write('x' * 3_000_000); print(); print('after'); exit(1)")
    with pytest.raises(ChildFailed):
        await asyncio.wait_for(run.run(), 60)
    assert "program | after" in capsys.readouterr().err


RUN_ONE = """
import asyncio, sys
from sparserve.cli.processes import Child

async def main():
    async def is_ready():
        return True
    await Child("program", [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"], is_ready).run()

asyncio.run(main())
"""


async def test_it_ends_with_the_process_that_started_it_even_where_that_is_killed(spawn_python):
    parent = await spawn_python(RUN_ONE)
    program = psutil.Process(int((await parent.line()).removeprefix("program | ")))
    parent.signal(signal.SIGKILL)
    await parent.ended()
    await asyncio.to_thread(psutil.wait_procs, [program], 30)
    assert not program.is_running()
