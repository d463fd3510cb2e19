"""`sparserve bench`: one command for each thing that is measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from sparserve.cli.bench_reports import (
    print_kernels,
    print_memory,
    print_offline,
    print_sweep,
)
from sparserve.cli.local import server_settings
from sparserve.cli.options import Command, Group, Policies, with_settings
from sparserve.cli.output import (
    check_folder,
    check_json_file,
    counting_bar,
    err,
    warn,
    write_json,
)
from sparserve.config import Dtype, EngineSettings
from sparserve.errors import ConfigError

if TYPE_CHECKING:
    from sparserve.bench.sweep import Plan
    from sparserve.model.catalog import DownloadProgress
    from sparserve.model.loader import LoadedModel

FORMATS = get_args(Dtype)
# The names are repeated here, for --help must not load torch.
PEERS = ("llama.cpp", "transformers", "openvino")

app = typer.Typer(help="Measure speed and memory beside rivals.", no_args_is_help=True, cls=Group)

Formats = Annotated[
    str,
    typer.Option(
        help=f"Formats of our weights, comma-separated: {', '.join(FORMATS)}. Default: --dtype's."
    ),
]
Peers = Annotated[
    str,
    typer.Option(
        help=f"Rivals to alternate with, comma-separated, or none: {', '.join(PEERS)}; each in its formats of "
        "the same bits as ours, or in the one that is named as in llama.cpp:Q4_K_M."
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
        str, typer.Option(help="Tokens in each prompt, comma-separated.")
    ] = "128,1024",
    new_tokens: Annotated[
        int, typer.Option(help="Tokens to generate for each prompt, greedily.", min=2)
    ] = 128,
    policies: Policies = "dense",
    text: Annotated[
        Path | None,
        typer.Option(
            help="Take prompts from this file: what several prompts choose together depends on how unlike they are. "
            "Default: a page of our own where a policy chooses neurons, else random ids."
        ),
    ] = None,
    rounds: Rounds = 5,
    peers: Peers = "transformers",
    json_file: JsonFile = None,
    png: PngFile = None,
) -> None:
    """Measure tokens/s after a prompt, for each format, policy, batch size and context.

    Prints the share of the byte bound: what the memory-read ceiling of the same run would allow. Of a policy
    also what it read, and which share of the time that reading less allows to save it saved.
    """
    from sparserve.bench.sweep import Plan

    batches, contexts = counts("--batch", batch), counts("--context", context)
    plan = Plan(
        "decode", batches, contexts, new_tokens, rounds, text="" if text is None else str(text)
    )
    _sweep(settings, plan, formats, peers, json_file, png, policies)


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

    batches, contexts = counts("--batch", batch), counts("--prompt-tokens", prompt_tokens)
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
    from sparserve.bench.peers.registry import open_peer, parse_peers, wanted_peers
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
    print_offline(report)
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

    plan = Plan(choose_levels(levels), counts("--batch", batch), context, prefill, rounds)
    refuse_own_limits(settings)
    check_threads(settings.threads)
    check_files(json_file, png)
    if settings.device.startswith("cuda"):
        raise ConfigError(
            f"device is {settings.device}, and this measures a CPU; leave --device out"
        )
    # Never a fallback: where the cpu backend cannot run, the settings are refused.
    settings = settings.model_copy(update={"backend": "cpu"})
    with counting_bar(own_thread=False) as show:
        model = _loader(settings, show)(settings.dtype)
        check_plan(plan, model.config.max_position_embeddings)
        decoders = make_decoders(model, settings, plan.levels)
        report = run_kernels(decoders, plan, model=model.name, on_progress=show)
    print_kernels(report)
    write_json(json_file, report.as_json())
    if png is not None:
        save_picture(draw(report), png)


@app.command("memory", cls=Command)
@with_settings(EngineSettings)
def memory(
    settings: EngineSettings,
    formats: Formats = "",
    batch: Annotated[int, typer.Option(help="Sequences that there is KV for.", min=1)] = 1,
    context: Annotated[int, typer.Option(help="Tokens in each prompt, random ids.", min=1)] = 1024,
    new_tokens: Annotated[
        int, typer.Option(help="Tokens to generate for each prompt, greedily.", min=2)
    ] = 16,
    peers: Annotated[
        str,
        typer.Option(
            help="Rivals beside it, comma-separated, or none: llama.cpp, openvino; named as in bench decode."
        ),
    ] = "none",
    json_file: JsonFile = None,
) -> None:
    """Measure the memory of a server in each format, loading and serving, in a process of its own.

    Prints it beside the bytes of its weights and of its KV, and beside sparserve's goal.
    """
    from sparserve.bench.memory import Plan, measure_memory
    from sparserve.bench.peers.registry import parse_peers

    names, specs = format_names(formats, settings.dtype), parse_peers(peers)
    refuse_own_limits(settings, "kv_cache_gib")
    check_json_file(json_file)
    with counting_bar(own_thread=False) as show:
        report = measure_memory(
            server_settings(settings),
            Plan(batch, context, new_tokens),
            names,
            specs,
            _loader(settings, show),
            show,
        )
    print_memory(report)
    write_json(json_file, report.as_json())


@app.command("plot-quality", cls=Command)
def plot_quality(
    reports: Annotated[
        list[Path],
        typer.Argument(
            help="Files that `sparserve eval --json` and `sparserve bench decode --json` wrote."
        ),
    ],
    png: Annotated[Path, typer.Option("--png", help="Draw the picture here.")],
    batch: Annotated[int, typer.Option(help="Speed of so many sequences at once.", min=1)] = 1,
    context: Annotated[
        int | None,
        typer.Option(help="Speed after so many prompt tokens; default: the fewest.", min=1),
    ] = None,
) -> None:
    """Draw speed against quality: tokens/s over KL, every format, policy and rival that both measured."""
    from sparserve.bench.plot_quality import draw_quality
    from sparserve.bench.quality_points import join

    check_files(None, png)
    points = join(reports, batch, context)
    for name in points.unmatched:
        warn(f"{name} has a speed or a KL, not both, and is left out")
    save_picture(draw_quality(points), png)


def _sweep(
    settings: EngineSettings,
    plan: Plan,
    formats: str,
    peers: str,
    json_file: Path | None,
    png: Path | None,
    policies: str = "dense",
) -> None:
    from sparserve.bench.formats import measure_formats
    from sparserve.bench.machine import check_threads
    from sparserve.bench.peers.registry import parse_peers
    from sparserve.bench.plot import draw
    from sparserve.bench.policies import parse_policies

    policy_specs = parse_policies(policies)
    names, specs = format_names(formats, settings.dtype), parse_peers(peers)
    refuse_own_limits(settings)
    check_threads(settings.threads)
    check_files(json_file, png)
    with counting_bar(own_thread=False) as show:
        load = _loader(settings, show)
        report = measure_formats(settings, plan, names, policy_specs, specs, load, show)
    print_sweep(report)
    write_json(json_file, report.as_json())
    if png is not None:
        save_picture(draw(report), png)


def refuse_own_limits(settings: EngineSettings, *others: str) -> None:
    own = {"max_context", "max_running", "prefix_cache", *others}
    if given := sorted(settings.model_fields_set & own):
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


def check_files(json_file: Path | None, png: Path | None) -> None:
    """Before the minutes that a measurement takes. Raises ConfigError."""
    from sparserve.bench.plot import require_matplotlib

    check_json_file(json_file)
    check_folder("--png", png)
    if png is not None:
        if png.suffix != ".png":
            raise ConfigError(f"{png} is no name of a picture; one ends in .png")
        require_matplotlib()


def save_picture(figure: Any, png: Path) -> None:
    figure.savefig(png)
    err.print(f"picture drawn in {png}")


def format_names(text: str, default: str) -> list[str]:
    names = [name.strip() for name in text.split(",")] if text else [default]
    if unknown := [name for name in names if name not in FORMATS]:
        raise ConfigError(
            f"no format is named {', '.join(unknown)}; there are: {', '.join(FORMATS)}"
        )
    return list(dict.fromkeys(names))


def counts(flag: str, text: str) -> list[int]:
    """A list of whole numbers from 1 on. Raises ConfigError."""
    words = [word.strip() for word in text.split(",")]
    if bad := [word for word in words if not word.isascii() or not word.isdigit() or int(word) < 1]:
        raise ConfigError(f"{flag} is {text!r}: {bad[0]!r} is no whole number from 1 on")
    return sorted({int(word) for word in words})
