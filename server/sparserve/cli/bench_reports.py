"""What `sparserve bench` prints of its reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Column, Table

from sparserve.cli.output import out, warn

if TYPE_CHECKING:
    from sparserve.bench.kernels import Point
    from sparserve.bench.kernels import Report as KernelReport
    from sparserve.bench.memory import Report as MemoryReport
    from sparserve.bench.offline import Report as OfflineReport
    from sparserve.bench.sweep import Ratio, Report, Row

BUSY = 0.1  # CPUs used by others, from which a report is not worth publishing


def print_sweep(report: Report) -> None:
    plan, first = report.plan, report.rows[0]
    decode = plan.phase == "decode"
    backends = ", ".join(dict.fromkeys(report.backends.values()))
    table = Table(
        "batch", "context", Column("system", no_wrap=True), Column("format", overflow="fold"), "tokens/s",
        "rounds", *(["of bound"] if decode else []),
        title=f"{first.model}: {plan.phase}" + (f", {plan.new_tokens} new tokens" if decode else ""),
        caption=f"{report.machine}, {report.threads} threads, backend {backends}; "
        f"medians of {plan.rounds} rounds; {_ceilings(report)}; "
        f"{report.cpus_used_by_others:.2f} CPUs used by others",
        box=box.SIMPLE, pad_edge=False,
    )  # fmt: skip
    before = (first.batch, first.context)
    for row in report.rows:
        if (row.batch, row.context) != before:
            table.add_section()
            before = (row.batch, row.context)
        table.add_row(
            str(row.batch),
            str(row.context),
            row.system,
            _with_policy(row),
            f"{row.tokens_per_second:.1f}",
            f"{row.tokens_per_second_low:.1f}-{row.tokens_per_second_high:.1f}",
            *([f"{row.percent_of_byte_bound:.0f} %"] if decode else []),
        )
    out.print(table)
    for ratio in report.ratios:
        out.print(
            f"batch {ratio.batch}, context {ratio.context}: {_with_policy(ratio)} {ratio.ratio:.2f}x "
            f"({ratio.ratio_low:.2f} to {ratio.ratio_high:.2f}) {ratio.peer} {ratio.peer_format}"
        )
    if any(row.against_dense is not None for row in report.rows):
        _print_policies(report.rows)
    warn_if_busy(report.cpus_used_by_others)


def _with_policy(row: Row | Ratio) -> str:
    return row.format if row.policy == "dense" else f"{row.format} {row.policy}"


def _print_policies(rows: list[Row]) -> None:
    table = Table(
        "batch", "context", Column("format, policy", overflow="fold"), "of MLP", "union", "speed", "saved of allowed",
        title="against the same format dense",
        caption="of MLP: share of the feed-forward bytes that a token reads; union: that a step reads for all; saved of "
        "allowed: of the time that reading less could save",
        box=box.SIMPLE, pad_edge=False,
    )  # fmt: skip
    for row in rows:
        if row.against_dense is not None:
            share = row.share_of_allowed_time
            table.add_row(
                str(row.batch),
                str(row.context),
                _with_policy(row),
                f"{row.density:.2f}",
                f"{row.union:.2f}",
                f"{row.against_dense:.2f}x",
                "" if share is None else f"{100 * share:.0f} %",
            )
    out.print(table)


def warn_if_busy(cpus_used_by_others: float) -> None:
    if cpus_used_by_others > BUSY:
        warn(
            f"other processes used {cpus_used_by_others:.2f} CPUs meanwhile: systems that wait for "
            "their slowest thread lose more than others; measure again when nothing else runs"
        )


def print_kernels(report: KernelReport) -> None:
    for point in report.plan.points:
        _print_step(report, point)
    out.print(
        f"{report.machine}, {report.threads} threads; medians of {report.plan.rounds} rounds; memory reads "
        f"at {report.read_ceiling_gb_s:.0f} GB/s; {report.cpus_used_by_others:.2f} CPUs used by others"
    )
    warn_if_busy(report.cpus_used_by_others)


def _print_step(report: KernelReport, point: Point) -> None:
    """A column for each phase. Reading bounds decode, arithmetic a prompt."""
    decode = point.kind == "decode"
    rows = [row for row in report.rows if (row.step, row.batch) == (point.kind, point.batch)]
    by_level = {level: [r for r in rows if r.level == level] for level in report.plan.levels}
    first = next(iter(by_level.values()))
    what = f"decode, batch {point.batch}, after" if decode else "prompt of"
    table = Table(
        Column("", no_wrap=True), *[Column(row.phase, justify="right") for row in first],
        title=f"{report.model}, {report.format}: {what} {point.context} tokens", box=box.SIMPLE, pad_edge=False,
    )  # fmt: skip
    table.add_row("MB to read", *[f"{r.bytes / 1e6:.1f}" for r in first], end_section=True)
    for level, own in by_level.items():
        table.add_row(f"{level}, ms", *[f"{row.milliseconds:.2f}" for row in own])
        if decode:
            shares = [f"{row.percent_of_ceiling:.0f}" if row.bytes else "" for row in own]
            table.add_row("% of ceiling", *shares)
        else:
            table.add_row("GFLOP/s", *[f"{r.gflops:.0f}" if r.gflops else "" for r in own])
    out.print(table)


def print_memory(report: MemoryReport) -> None:
    plan = report.plan
    beyond, sources = report.serving_beyond_bytes / 1e6, report.loading_sources
    table = Table(
        Column("system", no_wrap=True), "format",
        *[Column(name, justify="right") for name in
          ("weights", "KV", "imports", "serving", "own + file", "limit", "peak loading", "limit")],
        title=f"{report.model}: MB in main memory, {plan.batch} x {plan.context} prompt + {plan.new_tokens} new tokens",
        caption=f"{report.machine}; each system in a process of its own. Sparserve's limits: weights, KV and "
        f"{beyond:.0f} MB serving; {sources:g} x the file that it loads beside them while loading",
        box=box.SIMPLE, pad_edge=False,
    )  # fmt: skip
    for row in report.rows:
        ours = row.system == "sparserve"
        table.add_row(
            row.system,
            row.format,
            *map(_megabytes, (row.weight_bytes, row.kv_bytes, row.imported.total)),
            _megabytes(row.served.total),
            f"{_megabytes(row.served.anonymous)} + {_megabytes(row.served.file)}",
            _megabytes(row.serving_limit) if ours else "",
            _megabytes(row.loaded.peak),
            _megabytes(row.loading_limit) if ours else "",
        )
    out.print(table)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f}"


def _ceilings(report: Report) -> str:
    found = [row.read_ceiling_gb_s for row in report.rows]
    return f"memory reads at {min(found):.0f} to {max(found):.0f} GB/s"


def print_offline(report: OfflineReport) -> None:
    table = Table(
        "system", "format", "batch", "tokens/s", "TTFT", "% of byte bound",
        title=f"{report.rows[0].model}: {report.plan.prompt_tokens} prompt + {report.plan.new_tokens} new tokens",
        caption=f"{report.machine}, {report.threads} threads; read ceiling {report.rows[0].read_ceiling_gb_s} GB/s; "
        f"medians of {report.plan.rounds} rounds",
    )  # fmt: skip
    for row in report.rows:
        table.add_row(
            row.system,
            row.format,
            str(row.batch),
            f"{row.tokens_per_second:.1f}",
            f"{row.ttft_seconds * 1000:.0f} ms",
            f"{row.percent_of_byte_bound:.0f} %",
        )
    out.print(table)
    for peer, ratio in report.speed_against_peers.items():
        out.print(f"batch 1, whole generations: {ratio:.2f}x {peer}")
    ratio = report.concurrent_against_sequential
    out.print(
        f"{report.plan.concurrency} at once against {report.plan.concurrency} in sequence: {ratio:.2f}x"
    )
    if (ratio_served := report.served_against_offline) is not None:
        out.print(
            f"{report.plan.concurrency} streams over gRPC against offline: {ratio_served:.2f}x"
        )
    if (turns := report.conversation) is not None:
        out.print(
            f"conversation: TTFT {turns.first_ttft_seconds * 1000:.0f} ms for a first turn of "
            f"{turns.first_turn_tokens} tokens, {turns.second_ttft_seconds * 1000:.0f} ms for the second of "
            f"{turns.second_turn_tokens}: {turns.second_against_first:.2f}x"
        )
