"""Offline decode speed and TTFT: rivals alternated in one run, the read ceiling of that run beside.

The byte bound of a decode step is the time to read every weight once (embedding rows apart) at the
read ceiling, which is measured in the same run over a buffer as large as the step reads.
"""

from __future__ import annotations

import platform
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparse_kernels.native import read_probe
from sparserve import __version__
from sparserve.bench.systems import Prompts, Run, System
from sparserve.engine.engine import Engine
from sparserve.errors import ConfigError

# What a conversation's second turn adds: the model's answer and the user's next words.
SECOND_TURN_TOKENS = 64 + 24

# (what is measured, done, total)
BenchProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    prompt_tokens: int
    new_tokens: int
    rounds: int
    concurrency: int
    conversation_tokens: int  # of a conversation's first turn; 0: none is measured
    seed: int = 0

    @property
    def longest(self) -> int:
        """Positions that a run takes at most."""
        turn = self.conversation_tokens + SECOND_TURN_TOKENS if self.conversation_tokens else 0
        return max(self.prompt_tokens, turn) + self.new_tokens


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report; medians over the rounds."""

    system: str
    model: str
    format: str
    batch: int
    context: int  # prompt tokens
    new_tokens: int
    tokens_per_second: float  # decode, all sequences together
    ttft_seconds: float
    read_ceiling_gb_s: float
    percent_of_byte_bound: float


@dataclass(frozen=True, slots=True)
class Conversation:
    """The same beginning twice: TTFT of a first turn and of the next one, which has the prefix cache."""

    first_turn_tokens: int
    second_turn_tokens: int
    first_ttft_seconds: float
    second_ttft_seconds: float
    second_against_first: float  # median of per-round ratios; smaller is better


@dataclass(frozen=True, slots=True)
class Report:
    version: str
    time: str
    machine: str
    threads: int
    plan: Plan
    rows: list[Row]
    # Medians of per-round ratios; >= 1 is in sparserve's favour.
    speed_against_peers: dict[str, float]
    concurrent_against_sequential: float
    conversation: Conversation | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run_offline(
    engine: Engine,
    model_name: str,
    ours: System,
    peers: Sequence[System],
    plan: Plan,
    on_progress: BenchProgress,
) -> Report:
    """Measure batch 1 against the peers and `plan.concurrency` at once against one after another."""
    if plan.longest > engine.limits.max_context:
        raise ConfigError(
            f"{plan.longest} tokens of prompt and output exceed the context of "
            f"{engine.limits.max_context}; lower --prompt-tokens, --conversation-tokens or --new-tokens"
        )
    source = random.Random(plan.seed)
    step_bytes = engine.backend.info.weight_bytes
    systems = [ours, *peers]
    alone: dict[str, list[Run]] = {system.name: [] for system in systems}
    together: list[Run] = []
    in_sequence: list[float] = []
    turns: list[tuple[float, float]] = []
    ceilings: list[float] = []
    for system in systems:
        system.run(_prompts(source, engine, 1, plan.prompt_tokens), min(plan.new_tokens, 8))
    for done in range(plan.rounds):
        on_progress("alternating", done, plan.rounds)
        ceilings.append(read_probe(buffer_bytes=step_bytes, seconds=0.3).gb_per_s)
        prompt = _prompts(source, engine, 1, plan.prompt_tokens)
        for system in systems:
            alone[system.name].append(system.run(prompt, plan.new_tokens))
        prompts = _prompts(source, engine, 2 * plan.concurrency, plan.prompt_tokens)
        together.append(ours.run(prompts[: plan.concurrency], plan.new_tokens))
        # Others: the prefix cache would know those.
        later = prompts[plan.concurrency :]
        in_sequence.append(sum(ours.run([p], plan.new_tokens).total for p in later))
        if plan.conversation_tokens:
            (first,) = _prompts(source, engine, 1, plan.conversation_tokens)
            (rest,) = _prompts(source, engine, 1, SECOND_TURN_TOKENS)
            turns.append((ours.run([first], 2).ttft, ours.run([first + rest], 2).ttft))
    on_progress("alternating", plan.rounds, plan.rounds)
    ceiling = statistics.median(ceilings)

    def row(name: str, runs: Sequence[Run]) -> Row:
        speed = statistics.median(run.decode_tokens_per_second for run in runs)
        steps = speed / runs[0].batch
        return Row(
            system=name,
            model=model_name,
            format=engine.backend.info.dtype,
            batch=runs[0].batch,
            context=plan.prompt_tokens,
            new_tokens=plan.new_tokens,
            tokens_per_second=round(speed, 2),
            ttft_seconds=round(statistics.median(run.ttft for run in runs), 4),
            read_ceiling_gb_s=round(ceiling, 1),
            percent_of_byte_bound=round(100 * steps * step_bytes / (ceiling * 1e9), 1),
        )

    return Report(
        version=__version__,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=_machine(),
        threads=engine.backend.info.threads,
        plan=plan,
        rows=[*(row(name, runs) for name, runs in alone.items()), row(ours.name, together)],
        speed_against_peers={
            peer.name: _median_ratio(
                [run.total for run in alone[peer.name]], [run.total for run in alone[ours.name]]
            )
            for peer in peers
        },
        concurrent_against_sequential=_median_ratio(in_sequence, [run.total for run in together]),
        conversation=_conversation(turns, plan.conversation_tokens) if turns else None,
    )


def _conversation(turns: Sequence[tuple[float, float]], first_tokens: int) -> Conversation:
    first, second = [t[0] for t in turns], [t[1] for t in turns]
    return Conversation(
        first_turn_tokens=first_tokens,
        second_turn_tokens=first_tokens + SECOND_TURN_TOKENS,
        first_ttft_seconds=round(statistics.median(first), 4),
        second_ttft_seconds=round(statistics.median(second), 4),
        second_against_first=_median_ratio(second, first),
    )


def _median_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(theirs, ours, strict=True)), 3)


def _prompts(source: random.Random, engine: Engine, count: int, length: int) -> Prompts:
    """Fresh random token ids, so that nothing of them is cached yet."""
    vocab = engine.backend.config.vocab_size
    return [tuple(source.randrange(vocab) for _ in range(length)) for _ in range(count)]


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if "model name" in line
        ]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    return f"{cpu}, {platform.system()}"
