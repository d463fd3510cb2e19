"""Main memory of each system, loaded and serving, in a process of its own.

Several systems in one process would say nothing: they share libraries, and memory that one gave back is not
returned to the system. Peaks are the kernel's own (VmHWM), so nothing between two looks is missed.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from sparse_kernels.native import usable_cpus
from sparserve import __version__
from sparserve.bench.machine import describe_machine
from sparserve.bench.memory_child import RIVALS, Resident
from sparserve.bench.peers.registry import (
    Load,
    PeerSpec,
    llama_cpp_arguments,
    openvino_arguments,
    resolved,
    wanted_peers,
)
from sparserve.bench.rounds import BenchProgress, fresh_prompts
from sparserve.config import ServerSettings
from sparserve.engine.formats import with_dtype
from sparserve.errors import ConfigError, SparserveError
from sparserve.model.loader import find_model, open_checkpoint

# The goal of sparserve: at most so much beyond weights and KV when it serves, and while it loads so many
# times its source's size more.
SERVING_BEYOND = 450_000_000
LOADING_SOURCES = 1.3

_ARGUMENTS: dict[str, Callable[[str, Load], dict[str, Any]]] = {
    "llama.cpp": llama_cpp_arguments,
    "openvino": openvino_arguments,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Every system gets KV for exactly what it is asked: `batch` sequences of prompt and new tokens."""

    batch: int
    context: int  # prompt tokens
    new_tokens: int
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    system: str
    format: str
    source_bytes: int  # the file or files that it loads
    weight_bytes: int  # as they lie in memory; of a rival its file's
    kv_bytes: int
    imported: Resident
    loaded: Resident  # its peak is that of loading
    served: Resident  # after the first tokens

    @property
    def serving_limit(self) -> int:
        return self.weight_bytes + self.kv_bytes + SERVING_BEYOND

    @property
    def loading_limit(self) -> int:
        return self.serving_limit + int(LOADING_SOURCES * self.source_bytes)


@dataclass(frozen=True, slots=True)
class Report:
    version: str
    time: str
    machine: str
    model: str
    plan: Plan
    serving_beyond_bytes: int  # SERVING_BEYOND and LOADING_SOURCES of this version
    loading_sources: float
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_memory(
    settings: ServerSettings,
    plan: Plan,
    formats: Sequence[str],
    peers: Sequence[PeerSpec],
    load: Load,
    on_progress: BenchProgress,
) -> Report:
    """Measure `settings.model` served in each of `formats`, then every peer.

    Raises ConfigError, ModelError, and SparserveError of a system whose process fails.
    """
    _refuse_unmeasured(peers)
    name, source = find_model(settings.model, on_progress)
    config = open_checkpoint(source).config
    _check_context(config.max_position_embeddings, plan)
    prompts = fresh_prompts(random.Random(plan.seed), config.vocab_size, plan.batch, plan.context)
    rivals = _rivals(peers, formats, load) if peers else []
    common = {"prompts": prompts, "new_tokens": plan.new_tokens}
    threads = settings.threads or usable_cpus()
    jobs = [
        ({"system": "sparserve", "settings": _server(settings, plan, format), **common}, source)
        for format in formats
    ]
    jobs += [
        ({"system": peer, "arguments": own, "threads": threads, **common}, own["file"])
        for peer, own in rivals
    ]
    rows = []
    for done, (job, path) in enumerate(jobs):
        on_progress("memory", done, len(jobs))
        rows.append(_measure(job, checkpoint_bytes(path)))
    on_progress("memory", len(jobs), len(jobs))
    return Report(
        version=__version__,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        model=name,
        plan=plan,
        serving_beyond_bytes=SERVING_BEYOND,
        loading_sources=LOADING_SOURCES,
        rows=rows,
    )


def _rivals(
    peers: Sequence[PeerSpec], formats: Sequence[str], load: Load
) -> list[tuple[str, dict[str, Any]]]:
    """(peer, what it is made of). The model that their files are written from is gone afterwards."""
    loaded = cache(load)
    wanted = wanted_peers(peers, [resolved(format, loaded) for format in formats])
    return [(peer, _ARGUMENTS[peer](format, loaded)) for peer, format in wanted]


def _check_context(trained: int, plan: Plan) -> None:
    if (tokens := plan.context + plan.new_tokens) > trained:
        raise ConfigError(
            f"{tokens} tokens of prompt and output exceed the model's context of {trained}; lower --context"
        )


def checkpoint_bytes(path: Path) -> int:
    """Of a file, or of the weights in a model folder."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _refuse_unmeasured(peers: Sequence[PeerSpec]) -> None:
    if lacking := [spec.name for spec in peers if spec.name not in RIVALS]:
        raise ConfigError(
            f"the memory of {lacking[0]} is not measured; --peers takes {', '.join(RIVALS)}"
        )


def _server(settings: ServerSettings, plan: Plan, format: str) -> dict[str, Any]:
    own = {
        "max_context": plan.context + plan.new_tokens,
        "max_running": plan.batch,
        "max_batched_tokens": max(settings.max_batched_tokens, plan.batch),
    }
    return with_dtype(settings, format).model_copy(update=own).model_dump(mode="json")


def _measure(job: dict[str, Any], source_bytes: int) -> Row:
    """Raises SparserveError."""
    done = subprocess.run(
        [sys.executable, "-m", "sparserve.bench.memory_child"],
        input=json.dumps(job, default=str),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        why = lines[-1] if lines else f"it ended with status {done.returncode}; is there memory?"
        raise SparserveError(f"{job['system']} could not be measured: {why}")
    found = json.loads(done.stdout.splitlines()[-1])  # libraries may print before
    stages = found["stages"]
    return Row(
        system=job["system"],
        format=found["format"],
        source_bytes=source_bytes,
        weight_bytes=found["weight_bytes"],
        kv_bytes=found["kv_bytes"],
        imported=Resident(**stages["imported"]),
        loaded=Resident(**stages["loaded"]),
        served=Resident(**stages["served"]),
    )
