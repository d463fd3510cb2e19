"""What `sparserve bench serve` prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich import box
from rich.table import Column, Table

from sparserve.cli.bench_reports import warn_if_busy
from sparserve.cli.output import err, out, warn

if TYPE_CHECKING:
    from sparserve.bench.serve.report import Report, Row
    from sparserve.bench.serve.summary import Latency, Summary

LATENCIES = (
    ("TTFT", "ttft"),
    ("TTFT from send", "ttft_from_send"),
    ("TPOT", "tpot"),
    ("ITL", "itl"),
    ("E2E", "e2e"),
    ("E2E from send", "e2e_from_send"),
)


def print_serve(report: Report) -> None:
    """One load in full, several in a line each."""
    if len(report.plan.loads) == 1:
        _print_load(report)
    else:
        _print_sweep(report)
    for ratio in report.ratios:
        spread = f" ({ratio.low:.2f} to {ratio.high:.2f})" if report.plan.rounds > 1 else ""
        first = report.rows[0].target
        out.print(
            f"{ratio.label}: {first} {ratio.ratio:.2f}x {ratio.other} in output tokens/s{spread}"
        )
    _warn(report)


def tell_run(what: str, summary: Summary) -> None:
    """One dim line on stderr when a run has ended: a sweep may take an hour."""
    ttft = f", TTFT {summary.ttft.median:.0f} ms" if summary.ttft else ""
    failed = f", {summary.failed} failed" if summary.failed else ""
    told = f"{summary.output_tokens_per_second:.1f} output tokens/s{ttft}, {summary.completed} answered{failed}"
    err.print(f"[dim]{what}: {told}[/]", soft_wrap=True)


def _print_load(report: Report) -> None:
    rows = report.rows
    table = Table(
        Column("", no_wrap=True), *[Column(row.target, justify="right") for row in rows],
        title=f"{rows[0].label}: {report.plan.dataset}", caption=_caption(report), box=box.SIMPLE, pad_edge=False,
    )  # fmt: skip
    for name, figure in _figures(report):
        table.add_row(name, *[figure(row.summary) for row in rows])
    table.add_section()
    for title, field in LATENCIES:
        latencies: list[Latency | None] = [getattr(row.summary, field) for row in rows]
        for what, pick in _statistics(report):
            told = [pick(found) if found else "" for found in latencies]
            table.add_row(f"{what} {title}, ms", *told)
        table.add_section()
    for name, figure in _costs(report):
        if any(told := [figure(row.summary) for row in rows]):
            table.add_row(name, *told)
    out.print(table)


def _print_sweep(report: Report) -> None:
    """Latencies as the median and the highest percentile; a column that would say nothing is left out."""
    highest = f"{max(report.plan.percentiles):g}"
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("req/s", lambda row: f"{row.summary.requests_per_second:.2f}"),
        ("good", lambda row: f"{row.summary.good_requests_per_second or 0:.2f}"),
        ("tokens/s", _speed),
        ("TTFT", lambda row: _pair(row.summary.ttft, highest)),
        ("ITL", lambda row: _pair(row.summary.itl, highest)),
        ("E2E", lambda row: _pair(row.summary.e2e, highest)),
        ("failed", lambda row: str(row.summary.failed)),
    ]
    needless = {name for name, needed in (
        ("good", report.plan.slos), ("failed", any(row.summary.failed for row in report.rows)),
    ) if not needed}  # fmt: skip
    columns = [column for column in columns if column[0] not in needless]
    several = len(report.targets) > 1
    table = Table(
        Column("load", no_wrap=True), *([Column("server", no_wrap=True)] if several else []),
        *[Column(name, justify="right") for name, _ in columns],
        title=f"{report.plan.dataset}; output tokens/s; ms: median, p{highest}", caption=_caption(report),
        box=box.SIMPLE, pad_edge=False,
    )  # fmt: skip
    before = report.rows[0].label
    for row in report.rows:
        if row.label != before and several:
            table.add_section()
        before = row.label
        who = [row.target] if several else []
        table.add_row(row.label, *who, *[column(row) for _, column in columns])
    out.print(table)


def _pair(latency: Latency | None, highest: str) -> str:
    if latency is None:
        return ""
    values = (latency.median, latency.percentiles[highest])
    return ", ".join(f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in values)


def _speed(row: Row) -> str:
    """With the slowest and the fastest round."""
    middle = f"{row.summary.output_tokens_per_second:.1f}"
    if len(row.rounds) == 1:
        return middle
    speeds = [each.output_tokens_per_second for each in row.rounds]
    return f"{middle} ({min(speeds):.0f}-{max(speeds):.0f})"


def _figures(report: Report) -> list[tuple[str, Callable[[Summary], str]]]:
    slos = ", ".join(f"{name} {limit:g} ms" for name, limit in report.plan.slos.items())
    return [
        ("successful requests", lambda s: str(s.completed)),
        ("failed requests", lambda s: _failures(s)),
        ("duration, s", lambda s: f"{s.seconds:.2f}"),
        ("input tokens", lambda s: str(s.input_tokens)),
        ("generated tokens", lambda s: str(s.output_tokens)),
        ("requests/s", lambda s: f"{s.requests_per_second:.2f}"),
        *([(f"good requests/s ({slos})", lambda s: f"{s.good_requests_per_second:.2f}")] if slos else []),
        ("output tokens/s", lambda s: f"{s.output_tokens_per_second:.1f}"),
        ("peak output tokens/s", lambda s: f"{s.peak_output_tokens_per_second:.0f}"),
        ("total tokens/s", lambda s: f"{s.total_tokens_per_second:.1f}"),
        ("peak requests at once", lambda s: str(s.peak_concurrency)),
        ("tokens in a piece", lambda s: f"{s.tokens_per_piece:.2f}"),
    ]  # fmt: skip


def _costs(report: Report) -> list[tuple[str, Callable[[Summary], str]]]:
    """The CPU that it took, the server's memory, and what decoding read; "" of what is not known."""
    return [
        ("generator's CPU s", lambda s: f"{s.generator_cpu_seconds:.2f}"),
        ("p99 of its loop's lag, ms", lambda s: f"{s.loop_lag.percentiles['99']:.1f}" if s.loop_lag else ""),
        ("server's CPU s", lambda s: "" if s.server_cpu_seconds is None else f"{s.server_cpu_seconds:.2f}"),
        ("CPUs used by others", lambda s: "" if s.cpus_of_others is None else f"{s.cpus_of_others:.2f}"),
        ("server's RSS, MiB: first, most, last", lambda s: _memory(s)),
        ("largest, last quarter over second", lambda s: _growth(s)),
        ("policy", lambda s: ", ".join(s.quality.policies) if s.quality else ""),
        ("share of feed-forward bytes", lambda s: f"{s.quality.density:.3f}" if s.quality else ""),
        ("MB read for a token", lambda s: f"{s.quality.bytes_per_token / 1e6:.1f}" if s.quality else ""),
        ("predicted KL, nats a token", lambda s: _kl(s)),
        ("drafts accepted", lambda s: _drafts(s)),
    ]  # fmt: skip


def _statistics(report: Report) -> list[tuple[str, Callable[[Latency], str]]]:
    levels = [f"{level:g}" for level in report.plan.percentiles]
    return [
        ("mean", lambda found: f"{found.mean:.2f}"),
        ("median", lambda found: f"{found.median:.2f}"),
        *[(f"P{level}", _percentile(level)) for level in levels],
    ]


def _percentile(level: str) -> Callable[[Latency], str]:
    return lambda found: f"{found.percentiles[level]:.2f}"


def _failures(summary: Summary) -> str:
    told = ", ".join(f"{status} {count}" for status, count in summary.failures.items())
    return f"{summary.failed} ({told})" if told else "0"


def _memory(summary: Summary) -> str:
    return ", ".join(f"{size:.0f}" for size in summary.server_rss_mib or ())


def _growth(summary: Summary) -> str:
    growth = summary.server_rss_growth
    return "" if growth is None else f"{100 * growth:+.2f} %"


def _kl(summary: Summary) -> str:
    found = summary.quality
    return "" if found is None or found.predicted_kl is None else f"{found.predicted_kl:.3g}"


def _drafts(summary: Summary) -> str:
    found = summary.quality
    if found is None or not found.drafted_tokens:
        return ""
    return f"{found.accepted_tokens} of {found.drafted_tokens}"


def _caption(report: Report) -> str:
    told = [report.machine]
    if ceilings := report.read_ceilings_gb_s:
        told.append(f"memory reads at {min(ceilings):.0f} to {max(ceilings):.0f} GB/s")
    if report.plan.rounds > 1:
        told.append(f"{report.plan.rounds} rounds by turns")
    told += [
        f"{each['name']}: {each['model']}, tokens counted by {each['counted_by']}"
        for each in report.targets
    ]
    return "; ".join(told)


def _warn(report: Report) -> None:
    from sparserve.bench.serve.report import spoilt_by_lag

    warn_if_busy(max((row.summary.cpus_of_others or 0.0 for row in report.rows), default=0.0))
    for row in report.rows:
        where = f"{row.target}, {row.label}: "
        if told := spoilt_by_lag(row.summary):
            warn(where + told)
        if row.summary.failed:
            warn(where + f"{row.summary.failed} requests failed: {_failures(row.summary)}")
