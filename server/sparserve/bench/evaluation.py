"""Quality of a model as served, in several formats, against the original in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from sparse_kernels.native import usable_cpus
from sparserve.bench.cache import evaluation_cache
from sparserve.bench.lm_tasks import Tasks, TaskScore
from sparserve.bench.original import Original, original_states
from sparserve.bench.peers.registry import PeerSpec, source_model, wanted_peers
from sparserve.bench.policies import PolicySpec
from sparserve.bench.quality import Quality, Scored, Window, cut_windows, measure
from sparserve.bench.reads import DENSE_PLAN
from sparserve.bench.rounds import BenchProgress
from sparserve.bench.scored import Driver, ServedModel
from sparserve.bench.scored_peers import open_scored
from sparserve.bench.text import TEXTS, read_text, refuse_calibration_text, tokens_of
from sparserve.config import EngineSettings
from sparserve.engine.engine import Engine
from sparserve.engine.factory import assemble_engine
from sparserve.engine.formats import with_dtype
from sparserve.errors import ConfigError
from sparserve.model.loader import LoadedModel
from sparserve.sparsity.policy import PolicyKind

WINDOWS_AT_ONCE = 4

# (model, dtype) -> the model in memory
Load = Callable[[str, str], LoadedModel]


@dataclass(frozen=True, slots=True)
class Plan:
    text: Path
    formats: Sequence[str]
    policies: Sequence[PolicySpec]  # of each format
    original: str | None  # None: the model itself
    windows: int
    prompt_tokens: int
    decode_tokens: int
    peers: Sequence[PeerSpec] = ()
    cache: bool = True  # of the original's part


def evaluate_formats(
    settings: EngineSettings, plan: Plan, load: Load, on_progress: BenchProgress
) -> list[Quality]:
    """One row for each policy in each format of `settings.model`, then one for each peer on the same weights.

    Raises ConfigError, ModelError, or RequestError of a policy that this model or index cannot follow.
    """
    if any(spec.policy.kind is PolicyKind.EXACT for spec in plan.policies):
        raise ConfigError(
            "policy exact has the distributions of dense: leave it out here; sparserve bench decode "
            "measures its speed"
        )
    load = cache(load)
    reference = load(plan.original or settings.model, "float32")
    tokens = plan.prompt_tokens + plan.decode_tokens
    check_context(reference, tokens)
    windows = cut_windows(
        tokens_of(reference, read_text(plan.text)),
        plan.windows,
        plan.prompt_tokens,
        plan.decode_tokens,
    )
    settings = settings.model_copy(update={"max_context": tokens})
    threads = settings.threads or usable_cpus()
    systems: list[Scored] = []
    loaded = partial(load, settings.model)
    for name in plan.formats:
        model = source_model(name, loaded)
        _check_vocabulary(model, reference)
        systems += _served(model, with_dtype(settings, name), windows, plan)
    ours = dict.fromkeys(system.format for system in systems)
    for name, format in wanted_peers(plan.peers, list(ours)):
        systems.append(open_scored(name, format, loaded, windows, threads))
    kept = evaluation_cache() if plan.cache else None
    states = original_states(reference, windows, threads, kept, on_progress)
    original = Original(reference, windows, states)
    return measure(original.logits, systems, windows, on_progress, WINDOWS_AT_ONCE)


def evaluate_tasks(
    settings: EngineSettings,
    names: Sequence[str],
    folder: Path | None,
    limit: int | None,
    formats: Sequence[str],
    load: Load,
    on_progress: BenchProgress,
) -> list[TaskScore]:
    """lm-eval's tasks on each format of `settings.model`; see `Tasks`. Raises ConfigError or ModelError."""
    tasks = Tasks(names, folder)
    scores: list[TaskScore] = []
    for format in formats:
        model = source_model(format, partial(load, settings.model))
        scores += tasks.run(model, with_dtype(settings, format), limit, on_progress)
    return scores


def _engine(model: LoadedModel, settings: EngineSettings) -> Engine:
    """With a KV cache for the few windows that are scored together."""
    tokens = max(settings.max_batched_tokens, WINDOWS_AT_ONCE)
    own = {"max_running": WINDOWS_AT_ONCE, "max_batched_tokens": tokens}
    return assemble_engine(model, settings.model_copy(update=own)).engine


def _served(
    model: LoadedModel, settings: EngineSettings, windows: list[Window], plan: Plan
) -> list[ServedModel]:
    """A format under each of its policies, all over one copy of the weights."""
    if model.compressed is not None:
        refuse_calibration_text(plan.text, "compressed model", model.compressed.info.texts)
    engine = _engine(model, settings)
    plans = [engine.policies.plan(spec.policy) for spec in plan.policies]
    for own in plans:
        if own.index is not None:
            refuse_calibration_text(plan.text, "index", own.index.source.get(TEXTS))
    choosing = (own for own in plans if own.score is not None)
    driver = Driver(engine, next(choosing, DENSE_PLAN))
    dense = ServedModel(driver, windows)
    return [
        dense
        if spec.policy.kind is PolicyKind.DENSE
        else ServedModel(driver, windows, spec, own, dense)
        for spec, own in zip(plan.policies, plans, strict=True)
    ]


def check_context(model: LoadedModel, tokens: int) -> None:
    limit = model.config.max_position_embeddings
    if tokens > limit:
        raise ConfigError(
            f"windows of {tokens} tokens exceed the context of {model.name}, {limit}; lower "
            "--prompt-tokens or --decode-tokens"
        )


def _check_vocabulary(model: LoadedModel, reference: LoadedModel) -> None:
    """Tokens that only one of the two names are rows of the embedding that it leaves unused."""
    ours, theirs = model.config.vocab_size, reference.config.vocab_size
    if ours != theirs:
        raise ConfigError(
            f"{model.name} has a vocabulary of {ours} tokens, {reference.name} one of {theirs}: "
            "their distributions cannot be compared"
        )
    named = {i: token for token, i in reference.tokenizer.get_vocab().items()}
    for token, i in model.tokenizer.get_vocab().items():
        if named.get(i, token) != token:
            raise ConfigError(
                f"token {i} is {token!r} in {model.name}, {named[i]!r} in {reference.name}: their "
                "distributions cannot be compared"
            )
