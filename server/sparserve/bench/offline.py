"""Whole generations through the engine: decode speed and TTFT, alone, at once and in conversation.

Rivals are alternated in one run, the read ceiling of that run stands beside.

The byte bound of a decode step is the time to read every weight once (embedding rows apart) at the
read ceiling, which is measured in the same run over a buffer as large as the step reads.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from sparse_kernels._abi import SK_READ_PROBE_BLOCK_BYTES
from sparse_kernels.native import read_probe
from sparserve import __version__
from sparserve.bench.machine import describe_machine
from sparserve.bench.rounds import (
    BenchProgress,
    fresh_prompts,
    median_ratio,
    take_turns,
    wait_until_idle,
)
from sparserve.bench.systems import Run, System, bits
from sparserve.engine.engine import Engine
from sparserve.errors import ConfigError

# What a conversation's second turn adds: the model's answer and the user's next words.
SECOND_TURN_TOKENS = 64 + 24


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
    # Medians of per-round ratios to peers of the same bits; >= 1 is in sparserve's favour.
    speed_against_peers: dict[str, float]
    concurrent_against_sequential: float
    # As streams of a server whose client shares its CPUs; median of per-round ratios, None: not asked for.
    served_against_offline: float | None
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
    served: System | None = None,
) -> Report:
    """Measure batch 1 against the peers, `plan.concurrency` at once against one after another, and
    against as many streams of `served`.
    """
    if plan.longest > engine.limits.max_context:
        raise ConfigError(
            f"{plan.longest} tokens of prompt and output exceed the context of "
            f"{engine.limits.max_context}; lower --prompt-tokens, --conversation-tokens or --new-tokens"
        )
    source = random.Random(plan.seed)
    vocab_size = engine.backend.config.vocab_size
    info = engine.backend.info
    systems = [ours, *peers]
    alone: list[list[Run]] = [[] for _ in systems]
    together: list[Run] = []
    streamed: list[Run] = []
    at_once = [ours] if served is None else [ours, served]
    in_sequence: list[float] = []
    turns: list[tuple[float, float]] = []
    ceilings: list[float] = []
    for system in systems:
        system.run(
            fresh_prompts(source, vocab_size, 1, plan.prompt_tokens), min(plan.new_tokens, 8)
        )
    for done in range(plan.rounds):
        on_progress("alternating", done, plan.rounds)
        wait_until_idle()
        size = max(info.weight_bytes, info.threads * SK_READ_PROBE_BLOCK_BYTES)
        probe = read_probe(buffer_bytes=size, threads=info.threads, seconds=0.3)
        ceilings.append(probe.gb_per_s)
        prompt = fresh_prompts(source, vocab_size, 1, plan.prompt_tokens)
        runs = take_turns(systems, done, prompt, plan.new_tokens)
        for found, run in zip(alone, runs, strict=True):
            found.append(run)
        several = partial(fresh_prompts, source, vocab_size, plan.concurrency, plan.prompt_tokens)
        runs = take_turns(at_once, done, several(), plan.new_tokens)
        together.append(runs[0])
        streamed += runs[1:]
        later = several()  # others: the prefix cache would know those
        in_sequence.append(sum(ours.run([p], plan.new_tokens).total for p in later))
        if plan.conversation_tokens:
            (first,) = fresh_prompts(source, vocab_size, 1, plan.conversation_tokens)
            (rest,) = fresh_prompts(source, vocab_size, 1, SECOND_TURN_TOKENS)
            turns.append((ours.run([first], 2).ttft, ours.run([first + rest], 2).ttft))
    on_progress("alternating", plan.rounds, plan.rounds)
    ceiling = statistics.median(ceilings)

    row = partial(_row, model_name, plan, ceiling)
    return Report(
        version=__version__,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        threads=info.threads,
        plan=plan,
        rows=[
            *(row(system, runs, 1) for system, runs in zip(systems, alone, strict=True)),
            row(ours, together, plan.concurrency),
            *([row(served, streamed, plan.concurrency)] if served else []),
        ],
        speed_against_peers={
            f"{peer.name}:{peer.format}": median_ratio(
                [run.total for run in runs], [run.total for run in alone[0]]
            )
            for peer, runs in zip(peers, alone[1:], strict=True)
            if bits(peer.format) == bits(ours.format)
        },
        concurrent_against_sequential=median_ratio(in_sequence, [run.total for run in together]),
        served_against_offline=median_ratio(
            [run.total for run in together], [run.total for run in streamed]
        )
        if served
        else None,
        conversation=_conversation(turns, plan.conversation_tokens) if turns else None,
    )


def _row(
    model: str, plan: Plan, ceiling: float, system: System, runs: Sequence[Run], batch: int
) -> Row:
    speed = statistics.median(run.decode_tokens_per_second for run in runs)
    bound = ceiling * 1e9 / system.weight_bytes * batch
    return Row(
        system=system.name,
        model=model,
        format=system.format,
        batch=batch,
        context=plan.prompt_tokens,
        new_tokens=plan.new_tokens,
        tokens_per_second=round(speed, 2),
        ttft_seconds=round(statistics.median(run.ttft for run in runs), 4),
        read_ceiling_gb_s=round(ceiling, 1),
        percent_of_byte_bound=round(100 * speed / bound, 1),
    )


def _conversation(turns: Sequence[tuple[float, float]], first_tokens: int) -> Conversation:
    first, second = [t[0] for t in turns], [t[1] for t in turns]
    return Conversation(
        first_turn_tokens=first_tokens,
        second_turn_tokens=first_tokens + SECOND_TURN_TOKENS,
        first_ttft_seconds=round(statistics.median(first), 4),
        second_ttft_seconds=round(statistics.median(second), 4),
        second_against_first=median_ratio(second, first),
    )
