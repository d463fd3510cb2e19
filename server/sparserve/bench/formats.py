"""Our engine in several formats, and the peers that each is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparserve.bench.peers import PeerSpec, open_peer, wanted_peers
from sparserve.bench.rounds import BenchProgress
from sparserve.bench.sweep import Plan, Report, run_sweep
from sparserve.bench.systems import Sparserve
from sparserve.config import EngineSettings
from sparserve.engine.block_manager import blocks_for
from sparserve.engine.engine import Engine
from sparserve.engine.factory import assemble_engine
from sparserve.engine.formats import weight_formats, with_dtype
from sparserve.errors import ConfigError
from sparserve.model.backend import BLOCK_SIZE
from sparserve.model.loader import LoadedModel


def measure_formats(
    settings: EngineSettings,
    plan: Plan,
    formats: Sequence[str],
    peers: Sequence[PeerSpec],
    load: Callable[[str], LoadedModel],
    on_progress: BenchProgress,
) -> Report:
    """Measure `settings.model` in each of `formats` and every peer; `load` takes a data type.

    Raises ConfigError or UnsupportedModel.
    """
    models: dict[str, LoadedModel] = {}

    def loaded(dtype: str) -> LoadedModel:
        if dtype not in models:
            models[dtype] = load(dtype)
        return models[dtype]

    # "auto" may be one of the others.
    asked = [(loaded(name), with_dtype(settings, name)) for name in formats]
    unique = {(m.weights.dtype, weight_formats(own)): (m, own) for m, own in asked}
    engines = [_engine(model, own, plan) for model, own in unique.values()]
    info = [engine.backend.info for engine in engines]
    ours = [Sparserve(engine, prompts_cached=plan.phase == "decode") for engine in engines]
    first = models[formats[0]]
    wanted = wanted_peers(peers, [system.format for system in ours])
    return run_sweep(
        ours,
        [open_peer(name, format, loaded, info[0].threads) for name, format in wanted],
        plan,
        model=first.name,
        vocab_size=first.config.vocab_size,
        threads=info[0].threads,
        backends={each.dtype: each.name for each in info},
        on_progress=on_progress,
    )


def _engine(model: LoadedModel, settings: EngineSettings, plan: Plan) -> Engine:
    """With room for the largest point of `plan`. Raises ConfigError."""
    batch, trained = max(plan.batches), model.config.max_position_embeddings
    if plan.longest > trained:
        raise ConfigError(
            f"{plan.longest} tokens of prompt and output exceed {model.name}'s context of {trained}; "
            "give fewer"
        )
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
