"""`sparserve bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sparserve.cli.options import with_settings
from sparserve.cli.output import (
    check_json_file,
    counting_bar,
    out,
    progress_bars,
    write_json,
)
from sparserve.config import EngineSettings
from sparserve.errors import ConfigError

if TYPE_CHECKING:
    from sparserve.bench.offline import Report

PEERS = ("transformers",)


@with_settings(EngineSettings)
def bench(
    settings: EngineSettings,
    peers: Annotated[
        str,
        typer.Option(
            help=f"Rivals to alternate with, comma-separated, or none. There are: {', '.join(PEERS)}."
        ),
    ] = "transformers",
    prompt_tokens: Annotated[
        int, typer.Option(help="Tokens in each prompt, random ids.", min=1)
    ] = 64,
    new_tokens: Annotated[
        int, typer.Option(help="Tokens to generate for each prompt, greedily.", min=2)
    ] = 64,
    rounds: Annotated[
        int, typer.Option(help="Times to alternate; medians are reported.", min=1)
    ] = 5,
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
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report here as JSON.")
    ] = None,
) -> None:
    """Measure offline tokens/s and time to first token, alternating with rivals on the same weights.

    Prints the memory-read ceiling of the same run and what share of the byte bound was reached.
    """
    from sparserve.bench.offline import Plan, run_offline
    from sparserve.bench.systems import Sparserve, Transformers
    from sparserve.engine.factory import assemble_engine, load_by_settings

    names = [] if peers == "none" else [name.strip() for name in peers.split(",")]
    if unknown := [name for name in names if name not in PEERS]:
        raise ConfigError(
            f"no peer is named {', '.join(unknown)}; there are: {', '.join(PEERS)}, none"
        )
    check_json_file(json_file)
    with progress_bars() as bars:
        model = load_by_settings(settings, on_tensor=bars.on_tensor, on_download=bars.on_download)
    built = assemble_engine(model, settings)
    rivals = [Transformers(model) for _ in names]  # the only peer that there is
    concurrency = min(concurrency, settings.max_running)
    plan = Plan(prompt_tokens, new_tokens, rounds, concurrency, conversation_tokens)
    with counting_bar() as on_progress:
        report = run_offline(
            built.engine,
            model.name,
            Sparserve(built.engine),
            rivals,
            plan,
            on_progress,
        )
    _print(report)
    write_json(json_file, report.as_json())


def _print(report: Report) -> None:
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
    if (turns := report.conversation) is not None:
        out.print(
            f"conversation: TTFT {turns.first_ttft_seconds * 1000:.0f} ms for a first turn of "
            f"{turns.first_turn_tokens} tokens, {turns.second_ttft_seconds * 1000:.0f} ms for the second of "
            f"{turns.second_turn_tokens}: {turns.second_against_first:.2f}x"
        )
