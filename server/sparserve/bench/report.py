"""A model in many formats, by many recipes and under many policies, and peers: quality and speed in one grid.

Quality is `evaluation`'s, one copy of the weights in memory at a time, kept in a file as it comes. Speed is `sweep`'s:
all systems in memory, by turns in one run.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from sparse_kernels.native import usable_cpus
from sparserve import __version__
from sparserve.bench import evaluation, sweep
from sparserve.bench.evaluation import check_context
from sparserve.bench.formats import check_longest, prompts_of, sweep_engine
from sparserve.bench.machine import CpuWatch, describe_machine
from sparserve.bench.peers.gguf_files import bits_per_weight
from sparserve.bench.peers.registry import Load as PeerLoad
from sparserve.bench.peers.registry import PeerSpec, open_peer
from sparserve.bench.policies import PolicySpec
from sparserve.bench.quality import Quality, cut_windows
from sparserve.bench.report_models import CompressedModel
from sparserve.bench.report_quality import KeptQuality, measure_quality
from sparserve.bench.report_rows import Report
from sparserve.bench.report_tiers import Row
from sparserve.bench.report_weights import Load, Weights, label_of, prepare
from sparserve.bench.rounds import BenchProgress, median_ratio
from sparserve.bench.scored_peers import peer_file
from sparserve.bench.sweep import Point, Series, measure_point
from sparserve.bench.systems import Sparserve, System
from sparserve.bench.text import read_text, tokens_of
from sparserve.config import EngineSettings
from sparserve.engine.formats import with_dtype
from sparserve.errors import ConfigError
from sparserve.model.identity import hash_of_files
from sparserve.model.loader import LoadedModel
from sparserve.model.text import text_hash

QUALITY = "quality.json"  # in the folder of the report


@dataclass(frozen=True, slots=True)
class Plan:
    text: Path
    formats: Sequence[str]  # of the model as it is
    compressed: Sequence[CompressedModel]
    policies: Sequence[PolicySpec]  # of each of both
    indexes: Sequence[Path]
    peers: Sequence[tuple[str, str]]  # (name, format)
    windows: int
    prompt_tokens: int
    decode_tokens: int
    speed: sweep.Plan  # one batch size and context
    tiers: Sequence[float]
    baseline: str  # a label; "": the first system's

    @property
    def labels(self) -> list[str]:
        """Of all systems, those included that will turn out to lack an index."""
        names = [*self.formats, *(model.name for model in self.compressed)]
        ours = [label_of(name, spec) for name in names for spec in self.policies]
        return ours + [f"{name} {format}" for name, format in self.peers]


def check_plan(plan: Plan, source: LoadedModel) -> None:
    """Before the hours that compressing and measuring may take. Raises ConfigError."""
    if not plan.labels:
        raise ConfigError("nothing is to be measured: give --formats, --recipes or --peers")
    label, times = Counter(plan.labels).most_common(1)[0]
    if times > 1:
        raise ConfigError(
            f"{times} systems would be named {label!r}: rename a recipe or a folder, or leave one out"
        )
    _check_baseline(plan.baseline, plan.labels)
    check_context(source, plan.prompt_tokens + plan.decode_tokens)
    check_longest(source, plan.speed)
    tokens = tokens_of(source, read_text(plan.text))
    cut_windows(tokens, plan.windows, plan.prompt_tokens, plan.decode_tokens)


def _check_baseline(baseline: str, labels: Sequence[str]) -> None:
    if baseline and baseline not in labels:
        raise ConfigError(
            f"--baseline {baseline!r} is not measured; there are: {', '.join(labels)}"
        )


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of a system without measuring it."""

    label: str
    recipe: str | None
    bits: tuple[
        float, float
    ]  # of a weight of the original: of the layers' matrices, of all tensors
    pruned: float = 0
    healed: str | None = None


def make_report(
    settings: EngineSettings,
    plan: Plan,
    source: LoadedModel,
    load: Load,
    kept: KeptQuality,
    command: str,
    on_progress: BenchProgress,
    on_note: Callable[[str], None],
) -> Report:
    """Of `plan`, whose compressed models are all there. `source` is `settings.model`.

    Raises ConfigError, ModelError, or RequestError of a policy that this model cannot follow.
    """

    def weights_in(dtype: str) -> LoadedModel:
        return load(with_dtype(settings, dtype))

    weights = prepare(
        settings, plan.formats, plan.compressed, plan.policies, plan.indexes, plan.text, plan.speed, source.config, load
    )  # fmt: skip
    known = _known(weights, plan, weights_in)
    labels = [each.label for each in known]
    _check_baseline(plan.baseline, labels)
    baseline, model_hash = plan.baseline or labels[0], hash_of_files(source.path)
    qualities = measure_quality(
        settings, _to_score(plan, settings), weights, model_hash, load, kept, on_progress, on_note
    )
    threads = settings.threads or usable_cpus()
    systems = _systems(weights, plan, threads, load, weights_in)
    watch = CpuWatch()
    series = _measure_speed(systems, plan, source, threads, on_progress)
    others = round(watch.others(), 2)
    against = series[labels.index(baseline)]
    return Report(
        version=__version__,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        threads=threads,
        cpus_used_by_others=others,
        command=command,
        model=source.name,
        model_hash=model_hash,
        text=plan.text.name,
        text_hash=text_hash(plan.text.read_bytes()),
        windows=plan.windows,
        prompt_tokens=plan.prompt_tokens,
        decode_tokens=plan.decode_tokens,
        baseline=baseline,
        tiers=plan.tiers,
        rows=[_row(*each, plan, against) for each in zip(known, qualities, series, strict=True)],
    )


def _known(weights: Sequence[Weights], plan: Plan, weights_in: PeerLoad) -> list[_Known]:
    """Writes files of peers that are not there yet."""
    ours = [
        _Known(own.label(spec), own.recipe, own.bits, own.pruned, own.healed)
        for own in weights
        for spec in own.policies
    ]
    return ours + [
        _Known(f"{name} {format}", None, bits_per_weight(peer_file(name, format, weights_in)))
        for name, format in plan.peers
    ]


def _systems(
    weights: Sequence[Weights], plan: Plan, threads: int, load: Load, weights_in: PeerLoad
) -> list[System]:
    """In the order of `_known`. Policies share their weights."""
    systems: list[System] = []
    for own in weights:
        engine = sweep_engine(load(own.settings), own.settings, plan.speed)
        systems += [Sparserve(engine, spec, prompts_cached=True) for spec in own.policies]
    rivals = [open_peer(name, format, weights_in, threads) for name, format in plan.peers]
    return systems + rivals


def _to_score(plan: Plan, settings: EngineSettings) -> evaluation.Plan:
    return evaluation.Plan(
        plan.text,
        (),
        (),
        settings.model,
        plan.windows,
        plan.prompt_tokens,
        plan.decode_tokens,
        [PeerSpec(name, format) for name, format in plan.peers],
    )


def _measure_speed(
    systems: Sequence[System],
    plan: Plan,
    source: LoadedModel,
    threads: int,
    on_progress: BenchProgress,
) -> list[Series]:
    """Prompts are pieces of the text that is scored."""
    point = _point(plan)
    prompts, randomness = prompts_of(source, read_text(plan.text)), random.Random(plan.speed.seed)
    total, runs = len(systems) * (plan.speed.rounds + 1), count(1)
    on_progress("decode", 0, total)
    return measure_point(
        systems,
        point,
        threads,
        lambda: prompts(randomness, point.batch, point.context),
        lambda: on_progress("decode", next(runs), total),
    )


def _point(plan: Plan) -> Point:
    return Point(plan.speed, plan.speed.batches[0], plan.speed.contexts[0])


def _row(known: _Known, quality: Quality, series: Series, plan: Plan, against: Series) -> Row:
    timed = series.row("", _point(plan), None)
    return Row(
        system=timed.system,
        label=known.label,
        format=timed.format,
        recipe=known.recipe,
        policy=timed.policy,
        pruned=known.pruned,
        healed=known.healed,
        bits_decoder=round(known.bits[0], 4),
        bits_file=round(known.bits[1], 4),
        kl=quality.kl,
        kl_low=quality.kl_low,
        kl_high=quality.kl_high,
        top1=quality.top1,
        perplexity=quality.perplexity,
        density=quality.density,
        batch=timed.batch,
        context=timed.context,
        new_tokens=timed.new_tokens,
        tokens_per_second=timed.tokens_per_second,
        tokens_per_second_low=timed.tokens_per_second_low,
        tokens_per_second_high=timed.tokens_per_second_high,
        rounds=[round(speed, 2) for speed in series.speeds],
        read_ceiling_gb_s=timed.read_ceiling_gb_s,
        percent_of_byte_bound=timed.percent_of_byte_bound,
        ratio=median_ratio(series.speeds, against.speeds),
    )
