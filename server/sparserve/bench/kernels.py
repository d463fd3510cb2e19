"""Where a step's time goes on the cpu backend: the library's own phases, for each level of the
instruction set, alternated in one run.

Bytes are what a phase must read from memory: its matrices without padding, and for attention the KV
that is seen, once. Norms, biases and one row of the embedding a token are left out, and so are the
logits that the candidates are chosen from: they were just written and are in a cache.
"""

from __future__ import annotations

import random
import statistics
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import count
from typing import Any, Literal

import torch

from sparse_kernels._abi import SK_MAX_TOKENS, SK_READ_PROBE_BLOCK_BYTES, sk_isa
from sparse_kernels.decoder import PHASES, Decoder
from sparse_kernels.formats import DecoderFormats, MatrixFormat
from sparse_kernels.kv_memory import KvMemory
from sparse_kernels.native import cpu_features, isa_name, read_probe
from sparse_kernels.weights import DecoderConfig
from sparserve import __version__
from sparserve.bench.machine import CpuWatch, describe_machine
from sparserve.bench.rounds import BenchProgress, wait_until_idle
from sparserve.errors import ConfigError
from sparserve.model.backend import BLOCK_SIZE, Phase, SequenceInput
from sparserve.model.native import KV_SCALE_BYTES

LEVELS = tuple(
    isa_name(level) for level in sk_isa if sk_isa.SK_ISA_AUTO < level < sk_isa.SK_ISA_CUDA
)
WHOLE = "step"  # stands beside the phases' names for their sum
DECODE_STEPS = 8  # of a level in a round; their median counts
PROBE_SECONDS = 0.3

Kind = Literal["decode", "prefill"]


@dataclass(frozen=True, slots=True)
class Plan:
    levels: Sequence[str]
    batches: Sequence[int]  # sequences in a decode step
    context: int  # positions that each of them has KV for
    prefill: int  # tokens of one prompt; 0: none is measured
    rounds: int
    seed: int = 0

    @property
    def points(self) -> list[Point]:
        decode = [Point("decode", batch, self.context) for batch in self.batches]
        return decode + ([Point("prefill", 1, self.prefill)] if self.prefill else [])


@dataclass(frozen=True, slots=True)
class Point:
    """A step: a token for each of `batch` sequences after `context` positions, or one prompt of
    `context` tokens.
    """

    kind: Kind
    batch: int
    context: int

    @property
    def new_tokens(self) -> int:
        """Of one sequence."""
        return 1 if self.kind == "decode" else self.context

    @property
    def positions(self) -> range:
        """Those of the new tokens."""
        start = self.context if self.kind == "decode" else 0
        return range(start, start + self.new_tokens)

    @property
    def blocks(self) -> int:
        """KV blocks of one sequence."""
        return -(-self.positions.stop // BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class Row:
    """One phase of one step; medians over the rounds."""

    level: str
    step: Kind
    phase: str  # of PHASES, or WHOLE
    batch: int
    context: int
    milliseconds: float
    bytes: int
    gb_per_second: float
    percent_of_ceiling: float  # each round has a ceiling of its own
    gflops: float  # multiplications and additions of the matrices and of attention, 1e9 a second


@dataclass(frozen=True, slots=True)
class Report:
    version: str
    time: str
    machine: str
    model: str
    format: str  # of the weights
    threads: int
    cpus_used_by_others: float  # on average while it was measured; see `machine.CpuWatch`
    read_ceiling_gb_s: float  # median over the rounds
    plan: Plan
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def choose_levels(text: str) -> list[str]:
    """Levels of the instruction set by name, comma-separated, ascending; "auto" are all of this CPU.

    Raises ConfigError.
    """
    there = LEVELS[: LEVELS.index(cpu_features().highest_isa) + 1]
    names = [name.strip() for name in text.split(",")]
    if names == ["auto"]:
        return list(there)
    if unknown := [name for name in names if name not in LEVELS]:
        raise ConfigError(
            f"no level of the instruction set is named {unknown[0]!r}; there are: auto, {', '.join(LEVELS)}"
        )
    if lacking := [name for name in names if name not in there]:
        raise ConfigError(
            f"this CPU has no {', '.join(lacking)}; give some of {', '.join(there)}, or auto"
        )
    return [name for name in LEVELS if name in names]


def check_plan(plan: Plan, trained: int) -> None:
    """Raises ConfigError where a step is too large for the library or for `trained` positions."""
    for point in plan.points:
        if point.positions.stop > trained:
            raise ConfigError(
                f"{point.positions.stop} tokens exceed the model's context of {trained}; "
                "lower --context or --prefill"
            )
        if (tokens := point.batch * point.new_tokens) > SK_MAX_TOKENS:
            raise ConfigError(
                f"a {point.kind} step of {tokens} tokens exceeds the limit of {SK_MAX_TOKENS}; "
                "lower --batch or --prefill"
            )


def run_kernels(
    decoders: Sequence[Decoder], plan: Plan, *, model: str, on_progress: BenchProgress
) -> Report:
    """Measure every step of `plan` at every level: `decoders`, in the order of `plan.levels`, are
    one model. Raises ConfigError where its KV does not fit into memory.
    """
    formats, threads = decoders[0].formats, decoders[0].threads
    kv = _random_kv(decoders[0], plan)
    source, watch, done = random.Random(plan.seed), CpuWatch(), count(1)
    total = len(plan.points) * len(decoders) * (plan.rounds + 1)
    on_progress("kernels", 0, total)
    rows: list[Row] = []
    ceilings: list[float] = []
    for point in plan.points:
        times: dict[str, list[list[float]]] = {level: [] for level in plan.levels}
        own_ceilings: list[float] = []
        for turn in range(-1, plan.rounds):  # the first warms up
            if turn >= 0:
                own_ceilings.append(_read_ceiling(decoders[0], point))
            # Each round begins with another level, so that none always follows the same one.
            for place in range(len(decoders)):
                index = (turn + place) % len(decoders)
                wait_until_idle()
                steps = DECODE_STEPS if point.kind == "decode" and turn >= 0 else 1
                seconds = _phase_seconds(decoders[index], kv, point, steps, source)
                if turn >= 0:
                    times[plan.levels[index]].append(seconds)
                on_progress("kernels", next(done), total)
        ceilings += own_ceilings
        for level in plan.levels:
            rows += _rows(level, point, times[level], own_ceilings, decoders[0])
    return Report(
        version=__version__,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        model=model,
        format=str(formats),
        threads=threads,
        cpus_used_by_others=round(watch.others(), 2),
        read_ceiling_gb_s=round(statistics.median(ceilings), 1),
        plan=plan,
        rows=rows,
    )


def phase_bytes(
    config: DecoderConfig,
    point: Point,
    formats: DecoderFormats = DecoderFormats(),
    kv_bits: int = 16,
) -> dict[str, int]:
    """Phase -> bytes that it must read from memory in one step, with KV of `kv_bits` a number."""
    found = {
        name: sum(format.bytes(rows, columns) for rows, columns, format in matrices)
        for name, matrices in _matrices(config, formats).items()
    }
    first, last = point.positions.start, point.positions.stop
    # The first new position looks back the furthest.
    seen = (
        shape.num_kv_heads * (last - (max(0, first + 1 - shape.window) if shape.window else 0))
        for shape in config.layers
    )
    keys_and_values = 2 * (config.head_dim * kv_bits // 8 + KV_SCALE_BYTES[kv_bits])
    return {**found, "attention": point.batch * sum(seen) * keys_and_values, "candidates": 0}


def phase_operations(config: DecoderConfig, point: Point) -> dict[str, int]:
    """Phase -> multiplications and additions of its dot products in one step."""
    tokens = point.batch * point.new_tokens
    found = {
        name: 2 * tokens * sum(rows * columns for rows, columns, _ in matrices)
        for name, matrices in _matrices(config, DecoderFormats()).items()
    }
    found["head"] = found["head"] // point.new_tokens  # of a prompt's last row alone
    pairs = sum(
        shape.num_heads * sum(_seen(position, shape.window) for position in point.positions)
        for shape in config.layers
    )
    # A query with a key, and its weight with the value.
    return {**found, "attention": point.batch * pairs * 4 * config.head_dim, "candidates": 0}


def _matrices(
    config: DecoderConfig, formats: DecoderFormats
) -> dict[str, list[tuple[int, int, MatrixFormat]]]:
    """Phase -> (rows, columns, format) of its matrices, in all layers."""
    hidden, head = config.hidden_size, config.head_dim
    layers = [(shape, formats.layer(index)) for index, shape in enumerate(config.layers)]
    return {
        "qkv": [
            ((s.num_heads + 2 * s.num_kv_heads) * head, hidden, own.attention) for s, own in layers
        ],
        "output": [(hidden, s.num_heads * head, own.attention) for s, own in layers],
        "mlp": [
            (s.intermediate_size, hidden, format)
            for s, own in layers
            for format in (own.gate_up, own.gate_up, own.down)
        ],
        "head": [(config.vocab_size, hidden, formats.lm_head)],
    }


def _seen(position: int, window: int) -> int:
    """Positions that attention sees from `position`, its own included."""
    return min(position + 1, window) if window else position + 1


def _random_kv(decoder: Decoder, plan: Plan) -> KvMemory:
    """KV for the largest point. Untouched pages would all be one page of zeros, read from a cache."""
    blocks = max(point.batch * point.blocks for point in plan.points)
    # As bfloat16, numbers or scales, two such bytes are finite: 1e-14 to 3.
    random = torch.empty(decoder.kv_block_bytes, dtype=torch.uint8)
    try:
        kv = decoder.new_kv(blocks)
        for block in range(blocks):
            kv.write(block * len(random), random.random_(40, 64))
        return kv
    except MemoryError as error:
        raise ConfigError(f"KV does not fit: {error}; lower --batch or --context") from error


def _read_ceiling(decoder: Decoder, point: Point) -> float:
    """GB/s over a buffer as large as what the step reads."""
    read = sum(phase_bytes(decoder.config, point, decoder.formats, decoder.kv_bits).values())
    size = max(read, decoder.threads * SK_READ_PROBE_BLOCK_BYTES)
    wait_until_idle()
    return read_probe(buffer_bytes=size, threads=decoder.threads, seconds=PROBE_SECONDS).gb_per_s


def _phase_seconds(
    decoder: Decoder, kv: KvMemory, point: Point, steps: int, source: random.Random
) -> list[float]:
    """Medians over `steps` equal steps, by PHASES and then WHOLE."""
    found: list[list[float]] = []
    for _ in range(steps):
        sequences = list(_sequences(decoder.config, point, source))
        last_rows = [(index + 1) * point.new_tokens - 1 for index in range(point.batch)]
        seconds = array("d", bytes(8 * len(PHASES)))
        decoder.forward(
            sequences,
            kv,
            output_rows=last_rows,
            temperatures=[1.0] * point.batch,
            prompts=point.kind == "prefill" and decoder.formats.layers_quantized,
            phase_seconds=seconds,
        )
        found.append([*seconds, sum(seconds)])
    return [statistics.median(phase) for phase in zip(*found, strict=True)]


def _sequences(
    config: DecoderConfig, point: Point, source: random.Random
) -> Iterator[SequenceInput]:
    """Random tokens, the same positions each time: how long a step takes depends on no value."""
    for index in range(point.batch):
        tokens = [source.randrange(config.vocab_size) for _ in point.positions]
        table = range(index * point.blocks, (index + 1) * point.blocks)
        yield SequenceInput(tokens, point.positions.start, table, Phase(point.kind))


def _rows(
    level: str,
    point: Point,
    times: Sequence[Sequence[float]],  # [rounds][PHASES and WHOLE], seconds
    ceilings: Sequence[float],  # of each round
    decoder: Decoder,
) -> Iterator[Row]:
    sizes = phase_bytes(decoder.config, point, decoder.formats, decoder.kv_bits)
    operations = phase_operations(decoder.config, point)
    sizes[WHOLE], operations[WHOLE] = sum(sizes.values()), sum(operations.values())
    for name, seconds in zip((*PHASES, WHOLE), zip(*times, strict=True), strict=True):
        rates = [sizes[name] / 1e9 / s for s in seconds]
        shares = [rate / ceiling for rate, ceiling in zip(rates, ceilings, strict=True)]
        yield Row(
            level=level,
            step=point.kind,
            phase=name,
            batch=point.batch,
            context=point.context,
            milliseconds=round(statistics.median(seconds) * 1000, 4),
            bytes=sizes[name],
            gb_per_second=round(statistics.median(rates), 2),
            percent_of_ceiling=round(100 * statistics.median(shares), 1),
            gflops=round(operations[name] / 1e9 / statistics.median(seconds), 2),
        )
