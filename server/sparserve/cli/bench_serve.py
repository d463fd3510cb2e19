"""`sparserve bench serve`: load on running servers."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from sparserve.cli import sparsity_options as options
from sparserve.cli.bench import JsonFile, PngFile, check_files, save_picture
from sparserve.cli.connection import ApiKey, ClientCert, ClientKey, TlsCa, connection
from sparserve.cli.options import NO_VALUE, with_settings
from sparserve.cli.output import err, warn
from sparserve.cli.serve_load import (
    DATASETS,
    NUM_PROMPTS,
    OWN,
    Asked,
    find_vocabulary,
    make_loads,
    make_targets,
    numbers,
    own_server,
)
from sparserve.cli.serve_report import print_serve, tell_run
from sparserve.config import EngineSettings

if TYPE_CHECKING:
    from sparserve.bench.serve.report import Plan, Report
    from sparserve.bench.serve.run import Status
    from sparserve.bench.serve.targets import Target

# Not in the annotation, whose text may hold no backslash.
_DATASETS = (
    "random: token ids; prefix: token ids that begin with one of a few prefixes; sharegpt: conversations; text: "
    'paragraphs of any text; jsonl: a line for each, such as {"prompt": "Hello", "output_tokens": 32}.'
)
WHO, WHAT, WHEN, TOLD = "Who answers", "What is asked", "When", "What is reported"


@with_settings(EngineSettings)
def serve(
    settings: EngineSettings,
    server: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=WHO,
            help=f"host:port of a running sparserve; several, with commas between, take requests in turn. {OWN}: one is "
            f"started with the flags of the engine. Default: {OWN}, or none with --openai.",
        ),
    ] = None,
    server_pid: Annotated[
        list[int] | None,
        typer.Option(
            rich_help_panel=WHO,
            help="Its process, whose CPU time and memory are told; may be given again.",
        ),
    ] = None,
    api_key: ApiKey = None,
    tls_ca: TlsCa = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    openai: Annotated[
        str,
        typer.Option(
            rich_help_panel=WHO,
            help="Addresses of servers with OpenAI's /v1/completions, with commas between, each with a name if you like: "
            "llama.cpp=http://127.0.0.1:8080. All servers are loaded by turns with the same prompts.",
        ),
    ] = "",
    openai_model: Annotated[
        str | None,
        typer.Option(rich_help_panel=WHO, help="Model to ask them for. Default: their first."),
    ] = None,
    openai_pid: Annotated[
        list[int] | None,
        typer.Option(rich_help_panel=WHO, help="Their processes, one for each in their order."),
    ] = None,
    dataset: Annotated[
        str,
        typer.Option(
            rich_help_panel=WHAT,
            help=f"One of {', '.join(DATASETS)}. {_DATASETS}",
        ),
    ] = "random",
    dataset_path: Annotated[
        Path | None,
        typer.Option(rich_help_panel=WHAT, help="File of sharegpt, text or jsonl."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WHAT,
            help="Folder with the model's tokenizer.json. Default: our server's.",
        ),
    ] = None,
    input_len: Annotated[
        int, typer.Option(rich_help_panel=WHAT, help="Tokens of a random prompt.")
    ] = 128,
    output_len: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=WHAT,
            help="Tokens of each answer. Default: what the file says, else 64.",
        ),
    ] = None,
    range_ratio: Annotated[
        float,
        typer.Option(
            rich_help_panel=WHAT,
            help="Lengths of random prompts and answers vary by this share both ways; below 1.",
        ),
    ] = 0.0,
    num_prefixes: Annotated[int, typer.Option(rich_help_panel=WHAT, help="Of prefix.")] = 4,
    prefix_len: Annotated[int, typer.Option(rich_help_panel=WHAT, help="Of prefix; tokens.")] = 256,
    suffix_len: Annotated[int, typer.Option(rich_help_panel=WHAT, help="Of prefix; tokens.")] = 64,
    prompts_as_text: Annotated[
        bool,
        typer.Option(
            "--prompts-as-text",
            metavar=NO_VALUE,
            rich_help_panel=WHAT,
            help="Send made-up token ids as text, to servers that take nothing else.",
        ),
    ] = False,
    stop_at_eos: Annotated[
        bool,
        typer.Option(
            "--stop-at-eos",
            metavar=NO_VALUE,
            rich_help_panel=WHAT,
            help="Let the model end its answers. Without it each has exactly the tokens asked for.",
        ),
    ] = False,
    policy: options.Policy = None,
    density: options.Density = None,
    target_kl: options.TargetKl = None,
    draft: options.Draft = None,
    draft_tokens: options.DraftTokens = None,
    request_rate: Annotated[
        float,
        typer.Option(
            rich_help_panel=WHEN,
            help="Requests a second, at random times; inf: all at once, or each user's as soon as the last was answered "
            "with --max-concurrency.",
        ),
    ] = math.inf,
    burstiness: Annotated[
        float,
        typer.Option(
            rich_help_panel=WHEN,
            help="Shape of the gamma distribution of the times between requests: 1 Poisson, below it bursts, above more even.",
        ),
    ] = 1.0,
    ramp_up: Annotated[
        str,
        typer.Option(
            rich_help_panel=WHEN,
            help="In place of --request-rate: a rate that changes over the run, such as linear:1:20 or exponential:1:20.",
        ),
    ] = "",
    max_concurrency: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=WHEN,
            help="Requests at once at most; what is due waits here, and its wait counts.",
            min=1,
        ),
    ] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=WHEN, help=f"Requests of a run. Default: {NUM_PROMPTS}.", min=1
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=WHEN,
            help="In place of --num-prompts: seconds after which none is sent.",
        ),
    ] = None,
    sweep: Annotated[
        str,
        typer.Option(rich_help_panel=WHEN, help="Several loads in one run, such as 1,2,4,8,16,32."),
    ] = "",
    sweep_of: Annotated[
        str,
        typer.Option(rich_help_panel=WHEN, help="What --sweep lists: concurrency or rate."),
    ] = "concurrency",
    rounds: Annotated[
        int,
        typer.Option(
            rich_help_panel=WHEN,
            help="Times that all servers take their turn at every load.",
            min=1,
        ),
    ] = 1,
    warmup: Annotated[
        int,
        typer.Option(
            rich_help_panel=WHEN, help="Requests to each server before, not measured.", min=0
        ),
    ] = 1,
    seed: Annotated[
        int,
        typer.Option(
            rich_help_panel=WHEN, help="Same seed, same prompts at the same times.", min=0
        ),
    ] = 0,
    timeout: Annotated[
        float,
        typer.Option(rich_help_panel=WHEN, help="Seconds until a request is given up.", min=0.001),
    ] = 600.0,
    goodput: Annotated[
        str,
        typer.Option(
            rich_help_panel=TOLD,
            help="Milliseconds that a good request takes at most: ttft:200,tpot:50,e2e:5000, or some of them.",
        ),
    ] = "",
    percentiles: Annotated[
        str, typer.Option(rich_help_panel=TOLD, help="Of latencies, below 100.")
    ] = "90,99",
    json_file: JsonFile = None,
    png: PngFile = None,
) -> None:
    """Measure servers under load over gRPC: throughput, goodput, TTFT, TPOT, ITL and whole answers.

    The report is that of `vllm bench serve`. Latencies count from when a request was due, also where it had to wait for
    its turn.
    """
    from sparserve.bench.serve.report import Plan
    from sparserve.bench.serve.summary import parse_slos
    from sparserve.bench.serve.targets import Wish

    check_files(json_file, png)
    loads = make_loads(
        request_rate, burstiness, ramp_up, max_concurrency, num_prompts, duration, sweep, sweep_of
    )
    asked = Asked(
        dataset, dataset_path, tokenizer, input_len, output_len, range_ratio, num_prefixes,
        prefix_len, suffix_len, prompts_as_text, seed,
    )  # fmt: skip
    asked.check()
    levels = sorted(numbers("--percentiles", percentiles, 100))
    slos = parse_slos(goodput)
    plan = Plan(loads, rounds, warmup, seed, timeout, levels, slos, asked.words)
    fields = {
        "policy": policy, "density": density, "target_kl": target_kl, "draft": draft,
        "draft_tokens": draft_tokens,
    }  # fmt: skip
    wish = Wish(stop_at_eos, fields)
    there = connection(None if server == OWN else server, api_key, tls_ca, client_cert, client_key)
    with own_server(server, openai, settings) as own:
        targets = make_targets(
            own, there, server_pid or [], openai, openai_model, openai_pid or [], wish
        )
        with _progress() as show:
            report = asyncio.run(_measure(targets, asked, plan, show))
    print_serve(report)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_json()) + "\n", encoding="utf-8")
        err.print(f"report written to {json_file}")
    if png is not None:
        from sparserve.bench.plot_serve import draw_serve

        save_picture(draw_serve(report.as_json()), png)


def plot_serve(
    reports: Annotated[
        list[Path], typer.Argument(help="Files that `sparserve bench serve --json` wrote.")
    ],
    png: Annotated[Path, typer.Option("--png", help="Draw the picture here.")],
) -> None:
    """Draw latency against throughput, of one report of `bench serve` or several."""
    from sparserve.bench.plot_serve import draw_serve, read_reports

    check_files(None, png)
    save_picture(draw_serve(read_reports(reports)), png)


async def _measure(
    targets: list[Target], asked: Asked, plan: Plan, show: Callable[[str, Status], None]
) -> Report:
    from sparserve.bench.serve.datasets import FilePrompts
    from sparserve.bench.serve.measure import measure

    prompts = asked.prompts(await find_vocabulary(targets, asked))
    if isinstance(prompts, FilePrompts) and prompts.left_out:
        warn(f"{prompts.left_out} prompts of {asked.path} are too short or too long and left out")
    return await measure(targets, prompts, plan, show, tell_run)


@contextmanager
def _progress() -> Iterator[Callable[[str, Status], None]]:
    """`show(what, status)` draws a line on stderr for each `what`; it is drawn nowhere else, and takes no time between."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=err, transient=True, disable=not err.is_terminal, auto_refresh=False
    ) as progress:
        tasks: dict[str, TaskID] = {}

        def show(what: str, status: Status) -> None:
            told = f"{status.running} running, {status.tokens_per_second:.0f} pieces/s, {status.finished} done"
            if status.failed:
                told += f", [red]{status.failed} failed[/]"
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=1, told="")
            progress.update(tasks[what], completed=status.share, told=told, refresh=True)

        yield show
