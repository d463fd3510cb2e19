"""Random workloads over tiny KV pools: every request ends, and those that end well equal themselves alone."""

import random

import pytest

from sparserve.engine.block_manager import blocks_for
from sparserve.engine.engine import Engine
from sparserve.engine.request import (
    FinishReason,
    GenerationRequest,
    OutputParams,
    SamplingParams,
    StoppingParams,
    Update,
)
from sparserve.sparsity.policy import DENSE, DraftKind, Policy, PolicyKind

CONTEXT = 128  # of `small_pool`
POLICIES = [
    DENSE,
    DENSE,
    Policy(PolicyKind.CORE, 0.5, refresh_interval=6),
    Policy(PolicyKind.EXACT, draft=DraftKind.NGRAM),
    Policy(PolicyKind.EXACT, 0.6, draft=DraftKind.CORE),
]


def random_request(source: random.Random, key: str) -> GenerationRequest:
    length = source.choice([1, 8, 15, 16, 17, 32, 40, 48, source.randint(1, 80)])
    # Many begin alike and find each other's blocks in the prefix cache.
    shared = source.choice([0, length // 2, length])
    return GenerationRequest(
        key,
        tuple(i % 256 if i < shared else source.randrange(256) for i in range(length)),
        SamplingParams(temperature=source.choice([0.0, 1.0]), seed=source.randrange(1000)),
        StoppingParams(max_tokens=source.randint(10, 100), ignore_eos=True),
        OutputParams(
            top_logprobs=source.choice([0, 3]), prompt_logprobs=source.choice([None, None, 0, 3])
        ),
        policy=source.choice(POLICIES),
        report_statistics=source.random() < 0.3,
    )


def collect(results: dict[str, Update], updates: list[Update]) -> None:
    for update in updates:
        known = results.get(update.request_id)
        assert known is None or known.finish is None, "an update after the end"
        results[update.request_id] = update if known is None else known + update


def play(
    engine: Engine, source: random.Random, abort_share: float
) -> tuple[list[GenerationRequest], dict[str, Update]]:
    """Add requests at random moments, abort some, step until all have ended."""
    requests = [random_request(source, str(i)) for i in range(source.randint(5, 9))]
    results: dict[str, Update] = {}
    for request in requests:
        engine.validate(request)
        engine.add(request)
        for _ in range(source.randint(0, 25)):
            if engine.has_work:
                collect(results, engine.step())
            if source.random() < abort_share:
                collect(results, engine.abort(source.choice(requests).request_id))
    steps = 0
    while engine.has_work:
        collect(results, engine.step())
        steps += 1
        assert steps < 5000
    assert engine.used_blocks == engine.num_running == engine.num_waiting == 0
    assert all(results[r.request_id].finish is not None for r in requests)
    return requests, results


@pytest.mark.parametrize("seed", range(14))
def test_requests_equal_themselves_alone(small_pool, seed):
    source = random.Random(seed)
    max_running = source.choice([3, 4, 6])
    blocks = source.choice([blocks_for(CONTEXT), 9, 10, 12])
    engine = small_pool(blocks, max_running, max_running + source.choice([0, 1, 3, 20]))
    requests, results = play(engine, source, abort_share=0.02)
    alone = small_pool(blocks_for(CONTEXT), 1, 64)
    for request in requests:
        result = results[request.request_id]
        assert result.finish.reason is not FinishReason.ERROR
        alone.add(request)
        expected: dict[str, Update] = {}
        while alone.has_work:
            collect(expected, alone.step())
        wanted, made = expected[request.request_id], len(result.tokens)
        assert result.tokens == wanted.tokens[:made], "ids and log-probabilities, bit for bit"
        assert result.prompt == wanted.prompt or not made
        if result.finish.reason is not FinishReason.CANCELLED:
            assert made == len(wanted.tokens)
            assert result.finish.core_share == wanted.finish.core_share


@pytest.mark.parametrize("seed", range(4))
def test_failing_steps_lose_nobody(small_pool, seed, monkeypatch):
    source = random.Random(seed)
    engine = small_pool(9, 4, 12)
    for name in ("forward", "read_blocks", "write_blocks"):
        real = getattr(engine.backend, name)

        def failing(*args, real=real):
            if source.random() < 0.04:
                raise RuntimeError("planted")
            return real(*args)

        monkeypatch.setattr(engine.backend, name, failing)
    monkeypatch.setattr("sparserve.engine.engine.MAX_CONSECUTIVE_FAILURES", 1000)
    _, results = play(engine, source, abort_share=0.02)
    reasons = {result.finish.reason for result in results.values()}
    assert FinishReason.ERROR in reasons
