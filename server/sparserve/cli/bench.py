"""`sparserve bench`: one command for each thing that is measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich import box
from rich.table import Column, Table

from sparserve.cli.local import server_settings
from sparserve.cli.options import Command, Group, with_settings
from sparserve.cli.output import (
    check_folder,
    check_json_file,
    counting_bar,
    err,
    out,
    warn,
    write_json,
)
from sparserve.config import Dtype, EngineSettings
from sparserve.errors import ConfigError

if TYPE_CHECKING:
    from sparserve.bench.kernels import Point
    from sparserve.bench.kernels import Report as KernelReport
    from sparserve.bench.offline import Report as OfflineReport
    from sparserve.bench.sweep import Plan, Report
    from sparserve.model.catalog import DownloadProgress
    from sparserve.model.loader import LoadedModel

FORMATS = get_args(Dtype)
BUSY = 0.1  # CPUs used by others, from which a report is not worth publishing
# The names are repeated here, for --help must not load torch.
PEERS = ("llama.cpp", "transformers", "openvino")

app = typer.Typer(help="Measure speed beside rivals.", no_args_is_help=True, cls=Group)

Formats = Annotated[
    str,
    typer.Option(
        help=f"Formats of our weights, comma-separated: {', '.join(FORMATS)}. Default: --dtype's."
    ),
]
Peers = Annotated[
    str,
    typer.Option(
        help=f"Rivals to alternate with, comma-separated, or none: {', '.join(PEERS)}; each in our formats, "
        "or in one of its own as in llama.cpp:Q8_0 and openvino:int8."
    ),
]
Rounds = Annotated[int, typer.Option(help="Times to alternate; medians are reported.", min=1)]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report here as JSON.")]
PngFile = Annotated[Path | None, typer.Option("--png", help="Draw the rows here as a picture.")]


@app.command("decode", cls=Command)
@with_settings(EngineSettings)
def decode(
    settings: EngineSettings,
    formats: Formats = "",
    batch: Annotated[str, typer.Option(help="Sequences decoded at once, comma-separated.")] = "1,8",
    context: Annotated[
        str, typer.Option(help="Tokens in each prompt, random ids, comma-separated.")
    ] = "128,1024",
    new_tokens: Annotated[
        int, typer.Option(help="Tokens to generate for each prompt, greedily.", min=2)
    ] = 128,
    rounds: Rounds = 5,
    peers: Peers = "transformers",
    json_file: JsonFile = None,
    png: PngFile = None,
) -> None:
    """Measure tokens/s after a prompt, for each format, batch size and context.

    Prints the share of the byte bound: what the memory-read ceiling of the same run would allow.
    """
    from sparserve.bench.sweep import Plan

    batches, contexts = _counts("--batch", batch), _counts("--context", context)
    plan = Plan("decode", batches, contexts, new_tokens, rounds)
    _sweep(settings, plan, formats, peers, json_file, png)


@app.command("prefill", cls=Command)
@with_settings(EngineSettings)
def prefill(
    settings: EngineSettings,
    formats: Formats = "",
    batch: Annotated[str, typer.Option(help="Prompts sent at once, comma-separated.")] = "1",
    prompt_tokens: Annotated[
        str, typer.Option(help="Tokens in each prompt, random ids, comma-separated.")
    ] = "64,256,1024",
    rounds: Rounds = 5,
    peers: Peers = "transformers",
    json_file: JsonFile = None,
    png: PngFile = None,
) -> None:
    """Measure prompt tokens/s until the first token, for each format and prompt length."""
    from sparserve.bench.sweep import Plan

    batches, contexts = _counts("--batch", batch), _counts("--prompt-tokens", prompt_tokens)
    plan = Plan("prefill", batches, contexts, 1, rounds)
    _sweep(settings, plan, formats, peers, json_file, png)


@app.command("engine", cls=Command)
@with_settings(EngineSettings)
def engine(
    settings: EngineSettings,
    peers: Peers = "transformers",
    prompt_tokens: Annotated[
        int, typer.Option(help="Tokens in each prompt, random ids.", min=1)
    ] = 64,
    new_tokens: Annotated[
        int, typer.Option(help="Tokens to generate for each prompt, greedily.", min=2)
    ] = 64,
    rounds: Rounds = 5,
    concurrency: Annotated[
        int, typer.Option(help="Requests at once in the batched rows.", min=2)
    ] = 8,
    conversation_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens of a conversation's first turn, whose second turn has the prefix cache; 0: leave it out.",
            min=0,
        ),
    ] = 1000,
    served: Annotated[
        bool,
        typer.Option(
            "--served",
            help="Also as streams of a server in a process of its own, which loads the model again.",
        ),
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure whole generations: TTFT and tokens/s alone, at once, in sequence, in a conversation."""
    from sparserve.bench.machine import check_threads
    from sparserve.bench.offline import Plan, run_offline
    from sparserve.bench.peers import open_peer, parse_peers, wanted_peers
    from sparserve.bench.served import Served
    from sparserve.bench.systems import Sparserve
    from sparserve.engine.factory import assemble_engine

    specs = parse_peers(peers)
    check_threads(settings.threads)
    check_json_file(json_file)
    with counting_bar(own_thread=False) as show:
        load = _loader(settings, show)
        model = load(settings.dtype)
        built = assemble_engine(model, settings)
        info = built.engine.backend.info
        wanted = wanted_peers(specs, [info.dtype])
        rivals = [open_peer(name, format, load, info.threads) for name, format in wanted]
        concurrency = min(concurrency, settings.max_running)
        plan = Plan(prompt_tokens, new_tokens, rounds, concurrency, conversation_tokens)
        measure = partial(
            run_offline, built.engine, model.name, Sparserve(built.engine), rivals, plan, show
        )
        if served:
            with Served(server_settings(settings), info) as server:
                report = measure(server)
        else:
            report = measure()
    _print_offline(report)
    write_json(json_file, report.as_json())


@app.command("kernels", cls=Command)
@with_settings(EngineSettings)
def kernels(
    settings: EngineSettings,
    levels: Annotated[
        str,
        typer.Option(
            help="Levels of the instruction set, comma-separated: portable, avx2, avx512, amx; auto: all of this CPU."
        ),
    ] = "auto",
    batch: Annotated[
        str, typer.Option(help="Sequences in a decode step, comma-separated.")
    ] = "1,8,16",
    context: Annotated[
        int, typer.Option(help="Positions of each that have KV before a decode step.", min=1)
    ] = 128,
    prefill: Annotated[
        int, typer.Option(help="Tokens of a prompt, read in one step; 0: leave it out.", min=0)
    ] = 256,
    rounds: Rounds = 5,
    json_file: JsonFile = None,
    png: PngFile = None,
) -> None:
    """Measure where a step's time goes on the cpu backend, for each level of the instruction set.

    Prints the share of the read ceiling for decode, GFLOP/s for a prompt.
    """
    from sparserve.bench.kernels import Plan, check_plan, choose_levels, run_kernels
    from sparserve.bench.machine import check_threads
    from sparserve.bench.plot_kernels import draw
    from sparserve.engine.factory import make_decoders

    plan = Plan(choose_levels(levels), _counts("--batch", batch), context, prefill, rounds)
    _refuse_own_limits(settings)
    check_threads(settings.threads)
    _check_files(json_file, png)
    # Never a fallback: where the cpu backend cannot run, the settings are refused.
    settings = settings.model_copy(update={"backend": "cpu"})
    with counting_bar(own_thread=False) as show:
        model = _loader(settings, show)(settings.dtype)
        check_plan(plan, model.config.max_position_embeddings)
        decoders = make_decoders(model, settings, plan.levels)
        report = run_kernels(decoders, plan, model=model.name, on_progress=show)
    _print_kernels(report)
    write_json(json_file, report.as_json())
    if png is not None:
        _save_picture(draw(report), png)


def _sweep(
    settings: EngineSettings,
    plan: Plan,
    formats: str,
    peers: str,
    json_file: Path | None,
    png: Path | None,
) -> None:
    from sparserve.bench.formats import measure_formats
    from sparserve.bench.machine import check_threads
    from sparserve.bench.peers import parse_peers
    from sparserve.bench.plot import draw

    names, specs = _formats(formats, settings.dtype), parse_peers(peers)
    _refuse_own_limits(settings)
    check_threads(settings.threads)
    _check_files(json_file, png)
    with counting_bar(own_thread=False) as show:
        report = measure_formats(settings, plan, names, specs, _loader(settings, show), show)
    _print(report)
    write_json(json_file, report.as_json())
    if png is not None:
        _save_picture(draw(report), png)


def _refuse_own_limits(settings: EngineSettings) -> None:
    if given := sorted(settings.model_fields_set & {"max_context", "max_running", "prefix_cache"}):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(
            f"{flags}: the engine is made for the prompts and batches that are measured; leave it out"
        )


def _loader(settings: EngineSettings, show: DownloadProgress) -> Callable[[str], LoadedModel]:
    """Loads `settings.model` in a data type."""
    from sparserve.engine.factory import load_by_settings
    from sparserve.engine.formats import with_dtype

    def load(dtype: str) -> LoadedModel:
        return load_by_settings(
            with_dtype(settings, dtype),
            on_tensor=lambda done, total: show(f"loading {dtype}", done, total),
            on_download=show,
        )

    return load


def _check_files(json_file: Path | None, png: Path | None) -> None:
    """Before the minutes that a measurement takes. Raises ConfigError."""
    from sparserve.bench.plot import require_matplotlib

    check_json_file(json_file)
    check_folder("--png", png)
    if png is not None:
        if png.suffix != ".png":
            raise ConfigError(f"{png} is no name of a picture; one ends in .png")
        require_matplotlib()


def _save_picture(figure: Any, png: Path) -> None:
    figure.savefig(png)
    err.print(f"picture drawn in {png}")


def _formats(text: str, default: str) -> list[str]:
    names = [name.strip() for name in text.split(",")] if text else [default]
    if unknown := [name for name in names if name not in FORMATS]:
        raise ConfigError(
            f"no format is named {', '.join(unknown)}; there are: {', '.join(FORMATS)}"
        )
    return list(dict.fromkeys(names))


def _counts(flag: str, text: str) -> list[int]:
    """A list of whole numbers from 1 on. Raises ConfigError."""
    words = [word.strip() for word in text.split(",")]
    if bad := [word for word in words if not word.isascii() or not word.isdigit() or int(word) < 1]:
        raise ConfigError(f"{flag} is {text!r}: {bad[0]!r} is no whole number from 1 on")
    return sorted({int(word) for word in words})


def _print(report: Report) -> None:
    plan, first = report.plan, report.rows[0]
    decode = plan.phase == "decode"
    backends = ", ".join(dict.fromkeys(report.backends.values()))
    table = Table(
        "batch", "context", Column("system", no_wrap=True), "format", "tokens/s", "rounds",
        *(["of bound"] if decode else []),
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
            row.format,
            f"{row.tokens_per_second:.1f}",
            f"{row.tokens_per_second_low:.1f}-{row.tokens_per_second_high:.1f}",
            *([f"{row.percent_of_byte_bound:.0f} %"] if decode else []),
        )
    out.print(table)
    for ratio in report.ratios:
        out.print(
            f"batch {ratio.batch}, context {ratio.context}: {ratio.format} {ratio.ratio:.2f}x "
            f"({ratio.ratio_low:.2f} to {ratio.ratio_high:.2f}) {ratio.peer} {ratio.peer_format}"
        )
    _warn_if_busy(report.cpus_used_by_others)


def _warn_if_busy(cpus_used_by_others: float) -> None:
    if cpus_used_by_others > BUSY:
        warn(
            f"other processes used {cpus_used_by_others:.2f} CPUs meanwhile: systems that wait for "
            "their slowest thread lose more than others; measure again when nothing else runs"
        )


def _print_kernels(report: KernelReport) -> None:
    for point in report.plan.points:
        _print_step(report, point)
    out.print(
        f"{report.machine}, {report.threads} threads; medians of {report.plan.rounds} rounds; memory reads "
        f"at {report.read_ceiling_gb_s:.0f} GB/s; {report.cpus_used_by_others:.2f} CPUs used by others"
    )
    _warn_if_busy(report.cpus_used_by_others)


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


def _ceilings(report: Report) -> str:
    found = [row.read_ceiling_gb_s for row in report.rows]
    return f"memory reads at {min(found):.0f} to {max(found):.0f} GB/s"


def _print_offline(report: OfflineReport) -> None:
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
