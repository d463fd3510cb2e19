"""`sparserve eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich import box
from rich.table import Column, Table

from sparserve.cli.options import NO_VALUE, Policies, with_settings
from sparserve.cli.output import check_json_file, out, progress_bars, write_json
from sparserve.config import Dtype, EngineSettings
from sparserve.errors import ConfigError

if TYPE_CHECKING:
    from sparserve.bench.lm_tasks import TaskScore
    from sparserve.bench.quality import Quality
    from sparserve.model.loader import LoadedModel

FORMATS = get_args(Dtype)


@with_settings(EngineSettings)
def evaluate(
    settings: EngineSettings,
    text: Annotated[
        Path | None, typer.Argument(help="A text file, long enough for all windows.")
    ] = None,
    formats: Annotated[
        str,
        typer.Option(
            help=f"Formats of the weights to score, comma-separated: {', '.join(FORMATS)}. Default: --dtype's."
        ),
    ] = "",
    policies: Policies = "dense",
    peers: Annotated[
        str,
        typer.Option(
            help="Rivals to score on the same windows, comma-separated, each with its format: "
            "llama.cpp:Q4_K_M, openvino:int8. Without a format: those of the same bits as --formats."
        ),
    ] = "none",
    original: Annotated[
        str | None,
        typer.Option(help="The model to compare with, always in float32. Default: --model itself."),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows to score.", min=2)] = 200,
    prompt_tokens: Annotated[
        int, typer.Option(help="Prompt of each window, prefilled and not scored.", min=1)
    ] = 256,
    decode_tokens: Annotated[
        int, typer.Option(help="Tokens of each window that are decoded and scored.", min=1)
    ] = 64,
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache",
            metavar=NO_VALUE,
            help="Compute the original anew, and keep nothing of it for later runs.",
        ),
    ] = False,
    tasks: Annotated[
        str, typer.Option(help="Run these tasks of lm-eval instead of a text, comma-separated.")
    ] = "",
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder of YAML files with tasks of your own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Documents of each task at most; default: all.", min=1)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows here as JSON.")
    ] = None,
) -> None:
    """Measure what a model as served has lost: its distance from the original in float32, or lm-eval's tasks.

    TEXT is cut into windows: a prompt, and a continuation that is fed token by token through decode.
    Tells the mean KL divergence with its 95 % interval, top-1 agreement, perplexity and the bytes that
    a decode step reads; of a policy also its distance from the same format dense. With --tasks the scored tokens are decoded as well, and answers generated as they
    would be served.
    """
    from sparserve.bench.evaluation import Plan, evaluate_formats, evaluate_tasks
    from sparserve.bench.peers.registry import parse_peers
    from sparserve.bench.policies import parse_policies
    from sparserve.engine.factory import load_by_settings
    from sparserve.engine.formats import with_dtype

    names = [name.strip() for name in formats.split(",")] if formats else [settings.dtype]
    if unknown := [name for name in names if name not in FORMATS]:
        raise ConfigError(
            f"no format is named {', '.join(unknown)}; there are: {', '.join(FORMATS)}"
        )
    specs, wanted_policies = parse_peers(peers), parse_policies(policies)
    if (text is None) == (not tasks):
        raise ConfigError("give a text or --tasks, not both; sparserve eval --help tells more")
    if tasks and (specs or original or policies != "dense"):
        raise ConfigError("--peers, --policies and --original are for a text, not for --tasks")
    if text and (task_folder or limit):
        raise ConfigError("--task-folder and --limit are for --tasks, not for a text")
    check_json_file(json_file)
    with progress_bars() as bars:  # one display for loading and scoring

        def load(name: str, dtype: str) -> LoadedModel:
            own = with_dtype(settings, dtype).model_copy(update={"model": name})
            return load_by_settings(own, on_tensor=bars.on_tensor, on_download=bars.on_download)

        if text is None:
            wanted = [name.strip() for name in tasks.split(",")]
            scores = evaluate_tasks(
                settings, wanted, task_folder, limit, names, load, bars.on_download
            )
        else:
            plan = Plan(
                text, names, wanted_policies, original, windows, prompt_tokens, decode_tokens, specs,
                not no_cache,
            )  # fmt: skip
            rows = evaluate_formats(settings, plan, load, bars.on_download)
    if text is None:
        _print_tasks(settings.model, scores)
        write_json(json_file, [asdict(score) for score in scores])
    else:
        _print(settings.model, rows)
        write_json(json_file, [asdict(row) for row in rows])


def _print(model: str, rows: list[Quality]) -> None:
    table = Table(
        Column("system, format, policy", overflow="fold", min_width=18), "MB/ token", "of MLP",
        "KL, 95 % interval", "top-1", "ppl",
        title=f"{model} against the original in float32, {rows[0].windows} windows",
        box=box.SIMPLE, pad_edge=False,
    )  # fmt: skip
    for row in rows:
        table.add_row(
            _name(row),
            f"{row.bytes_per_token / 1e6:.1f}",
            f"{row.density:.3f}",
            _interval(row.kl, row.kl_low, row.kl_high),
            f"{row.top1:.1%}",
            f"{row.perplexity:.2f}",
        )
    out.print(table)
    if any(row.kl_dense is not None for row in rows):
        _print_to_dense(rows)


def _print_to_dense(rows: list[Quality]) -> None:
    table = Table(
        Column("format, policy", overflow="fold", min_width=18), "of MLP", "KL, 95 % interval", "predicted",
        "p95", "top-1", title="against the same format dense",
        box=box.SIMPLE, pad_edge=False,
    )  # fmt: skip
    for row in rows:
        if row.kl_dense is not None:
            assert row.kl_dense_low is not None
            assert row.kl_dense_high is not None
            table.add_row(
                f"{row.format} {row.policy}",
                f"{row.density:.3f}",
                _interval(row.kl_dense, row.kl_dense_low, row.kl_dense_high),
                "" if row.predicted_kl is None else f"{row.predicted_kl:.2g}",
                f"{row.kl_dense_p95_window:.2g}",
                f"{row.top1_dense:.1%}",
            )
    out.print(table)


def _name(row: Quality) -> str:
    resolved = "" if row.resolved is None else f" = {row.resolved}"
    return f"{row.system} {row.format} {row.policy}{resolved}"


def _interval(mean: float, low: float, high: float) -> str:
    return f"{mean:.2g} ({low:.2g}, {high:.2g})"


def _print_tasks(model: str, scores: list[TaskScore]) -> None:
    table = Table(
        Column("task", overflow="fold"), "metric", Column("format", no_wrap=True), "value, standard error",
        "documents", title=model,
    )  # fmt: skip
    for score in scores:
        table.add_row(
            score.task,
            score.metric,
            f"{score.format} {score.policy}",
            f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}"),
            str(score.samples),
        )
    out.print(table)
