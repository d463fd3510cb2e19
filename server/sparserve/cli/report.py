"""`sparserve report`."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparserve.cli.bench import FORMATS, Rounds, format_names, refuse_own_limits
from sparserve.cli.bench_reports import warn_if_busy
from sparserve.cli.options import Policies, with_settings
from sparserve.cli.output import counting_bar, err, out
from sparserve.config import EngineSettings
from sparserve.errors import ConfigError

if TYPE_CHECKING:
    from sparserve.bench.report_rows import Report
    from sparserve.model.loader import LoadedModel


@with_settings(EngineSettings)
def report(
    settings: EngineSettings,
    text: Annotated[
        Path,
        typer.Argument(
            help="A text file, long enough for all windows, that nothing was calibrated on; prompts are pieces of it."
        ),
    ],
    folder: Annotated[
        Path,
        typer.Option(
            "--out", help="Folder for report.json, report.md and report.png.", metavar="<folder>"
        ),
    ],
    recipes: Annotated[
        str,
        typer.Option(
            help="Recipes to compress the model by, into the folder of --out, comma-separated: quality, balanced, "
            "fast, YAML files, which most need --compress-text; or folders made of this model, compressed, pruned or healed. none: only the model as it is."
        ),
    ] = "none",
    formats: Annotated[
        str,
        typer.Option(
            help=f"Formats of the model as it is, comma-separated, or none: {', '.join(FORMATS)}. Default: --dtype's."
        ),
    ] = "",
    policies: Policies = "dense",
    peers: Annotated[
        str,
        typer.Option(
            help="Rivals in the same grid, comma-separated, each with its format: llama.cpp:Q4_K_M, openvino:int8. "
            "Without a format: those of the same bits as --formats."
        ),
    ] = "none",
    baseline: Annotated[
        str,
        typer.Option(
            help='What speeds are told against, by its name in the report, as in "llama.cpp Q4_0". Default: the first row.'
        ),
    ] = "",
    tiers: Annotated[
        str,
        typer.Option(
            help="KLs, comma-separated: at each the fastest of ours beside the fastest rival, and the fastest with and "
            "without sparsity, pruning and healing."
        ),
    ] = "0.005,0.06,0.3",
    windows: Annotated[int, typer.Option(help="Windows to score.", min=2)] = 200,
    prompt_tokens: Annotated[
        int, typer.Option(help="Prompt of each window, prefilled and not scored.", min=1)
    ] = 256,
    decode_tokens: Annotated[
        int, typer.Option(help="Tokens of each window that are decoded and scored.", min=1)
    ] = 64,
    batch: Annotated[int, typer.Option(help="Sequences decoded at once for the speed.", min=1)] = 1,
    context: Annotated[int, typer.Option(help="Tokens in each prompt for the speed.", min=1)] = 128,
    new_tokens: Annotated[
        int, typer.Option(help="Tokens to generate for each prompt, greedily.", min=2)
    ] = 128,
    rounds: Rounds = 5,
) -> None:
    """Measure quality, size and speed of recipes, formats and policies of one model, beside rivals.

    KL to the model in float32 as `sparserve eval` tells it, tokens/s as `sparserve bench decode`, all systems by
    turns in one run. What was compressed and scored before for the same report is not again: a run that was
    interrupted goes on. --index takes several files, comma-separated: each weights take the one that fits them.
    """
    from sparserve.bench.machine import check_threads
    from sparserve.bench.peers.registry import parse_peers, wanted_peers
    from sparserve.bench.plot import require_matplotlib
    from sparserve.bench.policies import parse_policies
    from sparserve.bench.report import QUALITY, Plan, check_plan, make_report
    from sparserve.bench.report_models import (
        check_models,
        check_texts,
        compress_missing,
        parse_recipes,
    )
    from sparserve.bench.report_quality import KeptQuality
    from sparserve.bench.scored_peers import check_scored
    from sparserve.bench.sweep import Plan as SpeedPlan
    from sparserve.engine.factory import load_by_settings
    from sparserve.engine.formats import with_dtype

    specs, policy_specs, limits = parse_peers(peers), parse_policies(policies), _tiers(tiers)
    names = [] if formats == "none" else format_names(formats, settings.dtype)
    refuse_own_limits(settings)
    if settings.compresses:
        raise ConfigError(
            "--compress and --prune are for a server of one recipe; here give --recipes, which may prune"
        )
    check_threads(settings.threads)
    require_matplotlib()
    models = parse_recipes(recipes, folder)
    texts = settings.compress_texts
    check_texts(models, texts, text)
    indexes = [Path(word.strip()) for word in settings.index.split(",") if word.strip()]
    settings = settings.model_copy(update={"index": "", "compress_text": ""})
    with counting_bar(own_thread=False) as show:

        def load(own: EngineSettings) -> LoadedModel:
            return load_by_settings(
                own,
                on_tensor=lambda done, total: show("loading weights", done, total),
                on_download=show,
            )

        source = load(with_dtype(settings, "auto"))
        names = _resolved(names, source, settings)
        wanted = wanted_peers(specs, names)
        for name, format in wanted:
            check_scored(name, format)
        speed = SpeedPlan("decode", [batch], [context], new_tokens, rounds)
        plan = Plan(
            text, names, models, policy_specs, indexes, wanted, windows, prompt_tokens, decode_tokens, speed,
            limits, baseline,
        )  # fmt: skip
        check_plan(plan, source)
        check_models(models, source, texts)
        kept = KeptQuality(folder / QUALITY)
        compress_missing(settings.model, models, texts, show)
        command = _command(sys.argv[1:])
        found = make_report(settings, plan, source, load, kept, command, show, err.print)
    _write(found, folder)


def _write(found: Report, folder: Path) -> None:
    from sparserve.bench.plot_quality import draw_quality
    from sparserve.bench.report_quality import writing
    from sparserve.bench.report_rows import markdown, points_of

    texts = {
        "report.json": json.dumps(found.as_json(), indent=1) + "\n",
        "report.md": markdown(found),
    }
    for name, content in texts.items():
        with writing(folder / name) as path:
            path.write_text(content, encoding="utf-8")
    with writing(folder / "report.png") as path:
        draw_quality(points_of(found)).savefig(path)
    out.print(texts["report.md"], markup=False, soft_wrap=True)
    err.print(f"report.json, report.md and report.png written to {folder}", soft_wrap=True)
    warn_if_busy(found.cpus_used_by_others)


def _resolved(formats: Sequence[str], source: LoadedModel, settings: EngineSettings) -> list[str]:
    """`formats` with what "auto" stands for, each once. Raises ConfigError of one that other flags do not allow."""
    from sparserve.bench.systems import data_type
    from sparserve.engine.backends import choose_backend
    from sparserve.engine.factory import format_name
    from sparserve.engine.formats import with_dtype

    own = data_type(format_name(source, with_dtype(settings, "auto"))) if "auto" in formats else ""
    found = list(dict.fromkeys(own if name == "auto" else name for name in formats))
    for name in found:
        choose_backend(with_dtype(settings, name), name)
    return found


def _tiers(text: str) -> list[float]:
    """Raises ConfigError."""
    limits = []
    for word in text.split(","):
        try:
            limit = float(word)
        except ValueError:
            limit = math.nan
        if not 0 < limit < math.inf:
            raise ConfigError(f"--tiers is {text!r}: {word.strip()!r} is no KL, a number above 0")
        limits.append(limit)
    return sorted(set(limits))


def _command(arguments: Sequence[str]) -> str:
    """As it was given, of files the names alone: reports are published."""

    def told(part: str) -> str:
        there = os.path.exists(os.path.expanduser(part))
        return (Path(part).name or part) if there else part

    words = ["".join(map(told, re.split("([,=])", word))) for word in arguments]
    return shlex.join(["sparserve", *words])
