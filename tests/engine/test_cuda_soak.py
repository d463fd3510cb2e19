"""Continuous batching on a GPU, for long; on the emulator the same, small: requests come, end, are aborted and
preempted, and each has the tokens that it has alone."""

import os
import random
from dataclasses import dataclass
from functools import partial

import pytest

from sparse_kernels.native import EMULATED
from sparserve.engine.engine import Engine
from sparserve.engine.request import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    StoppingParams,
    Update,
)
from sparserve.model.backend import BLOCK_SIZE
from sparserve.sparsity.policy import DENSE, DraftKind, Policy, PolicyKind

POLICIES = [
    DENSE,
    Policy(PolicyKind.CORE, 0.5, refresh_interval=6),
    Policy(PolicyKind.EXACT, draft=DraftKind.NGRAM),
]
CONTEXT = 128
POOL = 1.3 * CONTEXT / BLOCK_SIZE  # blocks of KV: too few for what runs together


@dataclass(frozen=True)
class Size:
    requests: int
    most_tokens: int  # of a prompt, and of an output


@pytest.fixture
def size(cuda) -> Size:
    return Size(7, 30) if EMULATED in os.environ else Size(300, 60)


@pytest.fixture
def make(native_engine, cuda):
    """`make(**settings)`: an engine on the GPU."""
    return partial(native_engine, backend="auto", device=cuda, dtype="int8", max_context=CONTEXT)


def random_request(source: random.Random, key: str, size: Size) -> GenerationRequest:
    length = source.randint(2, size.most_tokens)  # one token tells nothing of its neurons
    shared = source.choice([0, length // 2, length])  # with other prompts
    return GenerationRequest(
        key,
        tuple(i % 256 if i < shared else source.randrange(256) for i in range(length)),
        SamplingParams(temperature=source.choice([0.0, 1.0]), seed=source.randrange(1000)),
        StoppingParams(max_tokens=source.randint(4, size.most_tokens), ignore_eos=True),
        policy=source.choice(POLICIES),
    )


def play(
    engine: Engine, source: random.Random, requests: list[GenerationRequest]
) -> dict[str, Update]:
    """Add requests at random moments, abort some, step until all have ended."""
    results = {request.request_id: Update(request.request_id, 0) for request in requests}

    def collect(updates: list[Update]) -> None:
        for update in updates:
            results[update.request_id] += update

    for request in requests:
        engine.add(request)
        for _ in range(source.randint(0, 6)):
            collect(engine.step() if engine.has_work else [])
        if source.random() < 0.15:
            collect(engine.abort(source.choice(requests).request_id))
    while engine.has_work:
        collect(engine.step())
    assert engine.used_blocks == engine.num_running == engine.num_waiting == 0
    return results


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.soak) for i in range(1, 9))]
)
def test_requests_equal_themselves_alone(make, finish_all, size, seed):
    source = random.Random(seed)
    block_bytes = make().backend.info.kv_bytes_per_token * BLOCK_SIZE
    crowded = make(kv_cache_gib=POOL * block_bytes / 2**30, max_running=6, max_batched_tokens=32)
    preempted, preempt = [], crowded._scheduler._preempt
    crowded._scheduler._preempt = lambda *args: (preempted.append(args), preempt(*args))
    requests = [random_request(source, str(number), size) for number in range(size.requests)]
    found = play(crowded, source, requests)
    alone = make(max_running=1, prefix_cache=False, cuda_graphs=False)
    for request in requests:
        own = found[request.request_id]
        if own.finish.reason is FinishReason.CANCELLED and not own.tokens:
            continue
        ((_, expected),) = finish_all(alone, [request]).items()
        assert own.tokens == expected.tokens[: len(own.tokens)]
        if own.finish.reason is not FinishReason.CANCELLED:
            assert len(own.tokens) == len(expected.tokens)
    assert preempted or seed
    captures, launches, _, why_not = crowded.backend._decoder.graphs()
    assert 0 < captures < launches
    assert not why_not
