"""A process in which one system runs, measured from its imports to its first tokens.

`bench/memory.py` starts it. A job comes in as JSON, a record of each stage goes out. What it imports counts,
so a rival is loaded without torch, which sparserve needs and rivals do not.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from sparserve.errors import SparserveError

STATUS = Path("/proc/self/status")
# System -> the module and class of a rival that is made of its arguments.
RIVALS = {
    "llama.cpp": ("sparserve.bench.peers.llama_cpp", "LlamaCpp"),
    "openvino": ("sparserve.bench.peers.openvino", "OpenVino"),
}

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes of a process in main memory at one moment."""

    total: int
    anonymous: int  # its own
    file: int  # pages of files: libraries, mapped weights; the system takes them back where memory is short
    peak: int  # the largest total so far


def resident(status: str) -> Resident:
    """From the text of /proc/<pid>/status."""
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)

    def size(name: str) -> int:
        return int(fields[name].split()[0]) * 1024

    own = size("RssAnon") + size("RssShmem")
    return Resident(size("VmRSS"), own, size("RssFile"), size("VmHWM"))


def main() -> None:
    job = json.load(sys.stdin)
    stages: dict[str, Any] = {}

    def note(stage: str) -> None:
        stages[stage] = asdict(resident(STATUS.read_text()))

    try:
        found = (_rival if job["system"] in RIVALS else _sparserve)(job, note)
    except SparserveError as error:
        sys.exit(str(error))
    print(json.dumps({"stages": stages, **found}))


def _rival(job: dict[str, Any], note: Note) -> dict[str, Any]:
    module, name = RIVALS[job["system"]]
    make = getattr(import_module(module), name)
    arguments = job["arguments"]
    note("imported")
    system = make(**{**arguments, "file": Path(arguments["file"])}, threads=job["threads"])
    note("loaded")
    system.run(job["prompts"], job["new_tokens"])
    note("served")
    positions = len(job["prompts"]) * (len(job["prompts"][0]) + job["new_tokens"])
    return {
        "format": system.format,
        "weight_bytes": Path(arguments["file"]).stat().st_size,
        "kv_bytes": positions * system.kv_bytes_per_token,
    }


def _sparserve(job: dict[str, Any], note: Note) -> dict[str, Any]:
    """A whole server; a client of its own in the same process asks for the tokens."""
    from sparserve.api.server import Server
    from sparserve.client import AsyncClient
    from sparserve.config import ServerSettings
    from sparserve.engine.factory import build_engine
    from sparserve.model.backend import BLOCK_SIZE

    note("imported")
    settings = ServerSettings(**job["settings"])
    built = build_engine(settings)
    backend = built.engine.backend

    async def serve() -> None:
        server = Server(built.engine, built.model_name, settings)
        await server.start()
        note("loaded")
        options: Any = {"max_tokens": job["new_tokens"], "temperature": 0, "ignore_eos": True}
        async with AsyncClient(f"{settings.host}:{server.port}") as client:
            await asyncio.gather(*(client.generate(prompt, **options) for prompt in job["prompts"]))
        note("served")
        await server.drain_and_stop()

    asyncio.run(serve())
    return {
        "format": backend.info.dtype,
        "weight_bytes": backend.info.packed_bytes,
        "kv_bytes": backend.num_blocks * BLOCK_SIZE * backend.info.kv_bytes_per_token,
    }


if __name__ == "__main__":
    main()
