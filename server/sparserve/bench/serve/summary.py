"""Figures of runs: the report of `vllm bench serve`, with latencies from when requests were due."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from sparserve.bench.serve.records import Record, Run
from sparserve.errors import ConfigError

PEAK_WINDOW = 1.0  # seconds
SLOS = ("ttft", "tpot", "e2e")


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds."""

    mean: float
    median: float
    std: float
    percentiles: dict[str, float]  # "99" -> the value that 99 % are at most

    @classmethod
    def of(cls, seconds: Sequence[float], percentiles: Sequence[float]) -> Latency | None:
        """None of nothing."""
        if not seconds:
            return None
        values = 1000 * np.asarray(seconds)
        found = np.percentile(values, percentiles)
        named = {f"{p:g}": round(float(v), 3) for p, v in zip(percentiles, found, strict=True)}
        return cls(
            round(float(values.mean()), 3),
            round(float(np.median(values)), 3),
            round(float(values.std()), 3),
            named,
        )


@dataclass(frozen=True, slots=True)
class Quality:
    """What decoding read and is predicted to cost, means over the tokens of all answers; see SparsityReport."""

    policies: dict[str, int]  # -> answers
    density: float
    bytes_per_token: float
    dense_share: float
    drafted_tokens: int
    accepted_tokens: int
    predicted_kl: float | None  # None: some answer has none


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one run, or of several of the same load."""

    completed: int
    failed: int
    failures: dict[str, int]  # status -> requests
    seconds: float
    input_tokens: int
    output_tokens: int
    requests_per_second: float
    good_requests_per_second: float | None  # those within every SLO; None: there are no SLOs
    output_tokens_per_second: float
    total_tokens_per_second: float
    peak_output_tokens_per_second: float
    peak_concurrency: int
    tokens_per_piece: float
    ttft: Latency | None
    ttft_from_send: Latency | None
    tpot: Latency | None
    itl: Latency | None
    e2e: Latency | None
    e2e_from_send: Latency | None
    held_back: Latency | None  # from when a request was due until it was sent
    quality: Quality | None
    generator_cpu_seconds: float
    loop_lag: Latency | None
    server_cpu_seconds: float | None
    cpus_of_others: float | None  # used meanwhile; None: nobody said which the server's process is
    server_rss_mib: tuple[float, float, float] | None  # first, largest, last
    server_rss_growth: float | None  # largest of the last quarter over that of the second, less 1


def parse_slos(text: str) -> dict[str, float]:
    """Of "ttft:200,tpot:50": milliseconds that a request may take at most. Raises ConfigError."""
    found: dict[str, float] = {}
    for word in text.split(",") if text else ():
        name, _, value = word.strip().partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = 0.0
        if name not in SLOS or not limit > 0 or name in found:
            raise ConfigError(
                f"--goodput has {word!r}; it must be {', '.join(SLOS)}, each once with milliseconds above 0, such as "
                "ttft:200,tpot:50"
            )
        found[name] = limit
    return found


def is_good(record: Record, slos: dict[str, float]) -> bool:
    """Whether it succeeded within all of them; an answer of one token has no TPOT to fail."""
    if record.error:
        return False
    values = {"ttft": record.ttft, "tpot": record.tpot, "e2e": record.e2e}
    return all((value := values[name]) is None or 1000 * value <= slos[name] for name in slos)


def summarize(runs: Sequence[Run], percentiles: Sequence[float], slos: dict[str, float]) -> Summary:
    """Rates are over the time of all runs together; latencies are those of all their requests."""
    records = [record for run in runs for record in run.records]
    done = [record for record in records if not record.error]
    seconds = sum(run.seconds for run in runs)
    output = sum(record.output_tokens for record in done)
    given = sum(record.prompt_tokens for record in done)
    pieces = sum(len(record.times) for record in done)

    def rate(count: float) -> float:
        return round(count / seconds, 3) if seconds else 0.0

    def latency(values: Iterable[float | None]) -> Latency | None:
        return Latency.of([value for value in values if value is not None], percentiles)

    started = [record for record in done if record.times]
    usages = [run.server for run in runs if run.server is not None]
    return Summary(
        completed=len(done),
        failed=len(records) - len(done),
        failures=dict(Counter(record.error for record in records if record.error)),
        seconds=round(seconds, 3),
        input_tokens=given,
        output_tokens=output,
        requests_per_second=rate(len(done)),
        good_requests_per_second=rate(sum(is_good(r, slos) for r in done)) if slos else None,
        output_tokens_per_second=rate(output),
        total_tokens_per_second=rate(output + given),
        peak_output_tokens_per_second=max((peak_rate(run.records) for run in runs), default=0.0),
        peak_concurrency=max((peak_concurrency(run.records) for run in runs), default=0),
        tokens_per_piece=round(output / pieces, 3) if pieces else 0.0,
        ttft=latency(r.ttft for r in done),
        ttft_from_send=latency(r.times[0] - r.sent for r in started),
        tpot=latency(r.tpot for r in done),
        itl=latency(gap for r in done for gap in r.gaps),
        e2e=latency(r.e2e for r in done),
        e2e_from_send=latency(r.ended - r.sent for r in done),
        held_back=latency(r.sent - r.scheduled for r in records),
        quality=_quality(done),
        generator_cpu_seconds=round(sum(run.cpu_seconds for run in runs), 3),
        loop_lag=Latency.of([lag for run in runs for lag in run.lags], (99,)),
        server_cpu_seconds=round(sum(u.cpu_seconds for u in usages), 3) if usages else None,
        cpus_of_others=round(max(u.cpus_of_others for u in usages), 2) if usages else None,
        server_rss_mib=_memory([size for usage in usages for _, size in usage.rss]),
        server_rss_growth=next((u.growth for u in reversed(usages) if u.growth is not None), None),
    )


def peak_rate(records: Iterable[Record]) -> float:
    """Most tokens in a second of the clock, of all answers; where a server tells only how many an answer has in
    all, each of its pieces has as many."""
    counts: defaultdict[int, float] = defaultdict(float)
    for record in records:
        heard = sum(record.tokens)
        scale = record.output_tokens / heard if heard and not record.error else 1
        for at, tokens in zip(record.times, record.tokens, strict=True):
            counts[int(at / PEAK_WINDOW)] += tokens * scale
    return round(max(counts.values(), default=0) / PEAK_WINDOW, 3)


def peak_concurrency(records: Sequence[Record]) -> int:
    """Most requests that had been sent and not ended."""
    # Where one ends as another is sent, it ends first.
    events = sorted([(r.sent, 1) for r in records] + [(r.ended, -1) for r in records])
    running = most = 0
    for _, change in events:
        running += change
        most = max(most, running)
    return most


def median_ratio_of(runs: Sequence[Summary], others: Sequence[Summary]) -> tuple[float, ...]:
    """(median, lowest, highest) of output tokens/s, round by round."""
    found = [
        a.output_tokens_per_second / b.output_tokens_per_second
        for a, b in zip(runs, others, strict=True)
        if b.output_tokens_per_second
    ]
    return (median(found), min(found), max(found)) if found else ()


def _memory(sizes: Sequence[int]) -> tuple[float, float, float] | None:
    if not sizes:
        return None
    first, most, last = (round(size / 2**20, 1) for size in (sizes[0], max(sizes), sizes[-1]))
    return first, most, last


def _quality(records: Iterable[Record]) -> Quality | None:
    """None where nothing is told: of rivals, and where every answer was dense."""
    told = [(r.sparsity, r.output_tokens) for r in records if r.sparsity is not None]
    if all(found.policy == "dense" for found, _ in told):
        return None
    weights = [max(1, tokens) for _, tokens in told]
    kls = [found.predicted_kl for found, _ in told]
    known = [kl for kl in kls if kl is not None]

    def mean(values: Iterable[float]) -> float:
        return fmean(values, weights)

    return Quality(
        policies=dict(Counter(found.policy for found, _ in told)),
        density=mean(found.density for found, _ in told),
        bytes_per_token=mean(found.bytes_per_token for found, _ in told),
        dense_share=mean(found.dense_share for found, _ in told),
        drafted_tokens=sum(found.drafted_tokens for found, _ in told),
        accepted_tokens=sum(found.accepted_tokens for found, _ in told),
        predicted_kl=mean(known) if len(known) == len(kls) else None,
    )
