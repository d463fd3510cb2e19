"""Our engine in several formats and policies, and the peers that each is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sparserve.bench.peers.registry import (
    PeerSpec,
    open_peer,
    source_model,
    wanted_peers,
)
from sparserve.bench.policies import PolicySpec
from sparserve.bench.rounds import BenchProgress, fresh_prompts, text_prompts
from sparserve.bench.sweep import Plan, PromptMaker, Report, run_sweep
from sparserve.bench.systems import Sparserve
from sparserve.bench.text import read_text, tokens_of
from sparserve.config import EngineSettings
from sparserve.engine.block_manager import blocks_for
from sparserve.engine.engine import Engine
from sparserve.engine.factory import assemble_engine, format_name
from sparserve.engine.formats import with_dtype
from sparserve.errors import ConfigError
from sparserve.model.backend import BLOCK_SIZE
from sparserve.model.calibration import CALIBRATION_TEXT
from sparserve.model.loader import LoadedModel
from sparserve.sparsity.policy import PolicyKind


def measure_formats(
    settings: EngineSettings,
    plan: Plan,
    formats: Sequence[str],
    policies: Sequence[PolicySpec],
    peers: Sequence[PeerSpec],
    load: Callable[[str], LoadedModel],
    on_progress: BenchProgress,
) -> Report:
    """Measure `settings.model` in each of `formats` under each of `policies`, and every peer; `load` takes a
    data type.

    Raises ConfigError, UnsupportedModel, or RequestError of a policy that cannot be followed.
    """
    text = read_text(Path(plan.text)) if plan.text else CALIBRATION_TEXT
    models: dict[str, LoadedModel] = {}

    def loaded(dtype: str) -> LoadedModel:
        if dtype not in models:
            models[dtype] = load(dtype)
        return models[dtype]

    # "auto" may be one of the others.
    asked = [(source_model(name, loaded), with_dtype(settings, name)) for name in formats]
    unique = {format_name(m, own): (m, own) for m, own in asked}
    engines = [sweep_engine(model, own, plan) for model, own in unique.values()]
    info = [engine.backend.info for engine in engines]
    ours = [
        Sparserve(engine, spec, prompts_cached=plan.phase == "decode")
        for engine in engines
        for spec in policies
    ]
    first = asked[0][0]
    chosen = any(spec.policy.kind is not PolicyKind.DENSE for spec in policies)
    wanted = wanted_peers(peers, [each.dtype for each in info])
    return run_sweep(
        ours,
        [open_peer(name, format, loaded, info[0].threads) for name, format in wanted],
        plan,
        model=first.name,
        prompts=prompts_of(first, text) if chosen or plan.text else _random_prompts(first),
        threads=info[0].threads,
        backends={each.dtype: each.name for each in info},
        on_progress=on_progress,
    )


def _random_prompts(model: LoadedModel) -> PromptMaker:
    vocab_size = model.config.vocab_size
    return lambda source, count, length: fresh_prompts(source, vocab_size, count, length)


def prompts_of(model: LoadedModel, text: str) -> PromptMaker:
    """Raises ConfigError of a text without words."""
    tokens = tokens_of(model, text)
    if not tokens:
        raise ConfigError("the file of --text is empty; give one with words in it")
    return lambda source, count, length: text_prompts(source, tokens, count, length)


def sweep_engine(model: LoadedModel, settings: EngineSettings, plan: Plan) -> Engine:
    """With room for the largest point of `plan`. Raises ConfigError."""
    check_longest(model, plan)
    batch = max(plan.batches)
    own = {
        "max_context": plan.longest,
        "max_running": batch,
        # What the prefix cache lacks of all prompts fits in one step.
        "max_batched_tokens": max(settings.max_batched_tokens, batch * BLOCK_SIZE),
        "prefix_cache": True,
    }
    engine = assemble_engine(model, settings.model_copy(update=own)).engine
    needed, there = batch * blocks_for(plan.longest), engine.backend.num_blocks
    if needed > there:
        raise ConfigError(
            f"{batch} sequences of {plan.longest} tokens need {needed} KV blocks, the cache has {there}; "
            "raise --kv-cache-gib, or give fewer or shorter ones"
        )
    return engine


def check_longest(model: LoadedModel, plan: Plan) -> None:
    """Raises ConfigError."""
    trained = model.config.max_position_embeddings
    if plan.longest > trained:
        raise ConfigError(
            f"{plan.longest} tokens of prompt and output exceed {model.name}'s context of {trained}; "
            "give fewer"
        )
