"""The engine on a GPU, or on what emulates one: the tokens of the CPU."""

import logging
import os
import random
from functools import partial

import pytest

from sparse_kernels.native import EMULATED, load
from sparserve.engine.request import GenerationRequest, SamplingParams, StoppingParams
from sparserve.model import packing
from sparserve.model.backend import BLOCK_SIZE
from sparserve.sparsity.policy import Policy, PolicyKind

FORMATS = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8 in planes, int8 KV": {"dtype": "int8", "weight_planes": "4+4", "kv_dtype": "int8"},
    "int4": {"dtype": "int4"},
}
POLICIES = (Policy(PolicyKind.DENSE), Policy(PolicyKind.CORE, 0.5), Policy(PolicyKind.EXACT))


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def engines(request, native_engine, cuda):
    """`make(**settings)` on the CPU, and on a GPU."""
    return (
        partial(native_engine, **request.param),
        partial(native_engine, backend="auto", device=cuda, **request.param),
    )


def greedy(count: int, tokens: int = 12) -> list[GenerationRequest]:
    source = random.Random(3)
    stem = tuple(source.randrange(256) for _ in range(20))
    return [
        GenerationRequest(
            str(number),
            stem + tuple(source.randrange(256) for _ in range(source.randint(1, 30))),
            SamplingParams(temperature=0),
            StoppingParams(max_tokens=tokens, ignore_eos=True),
            policy=POLICIES[number % len(POLICIES)],
        )
        for number in range(count)
    ]


def token_ids(results) -> dict[str, list[int]]:
    return {key: [token.id for token in update.tokens] for (key, _), update in results.items()}


def test_greedy_tokens_are_those_of_the_cpu(engines, finish_all, monkeypatch):
    make_on_cpu, make_on_gpu = engines
    with monkeypatch.context() as patched:
        # AMX rounds prompts in another way, which a random model's next token may depend on.
        patched.setattr(packing, "Decoder", partial(packing.Decoder, isa="portable"))
        on_cpu = make_on_cpu()
    on_gpu = make_on_gpu()
    assert on_gpu.backend.info.name == "cuda"
    expected = token_ids(finish_all(on_cpu, greedy(6), stagger=2))
    assert token_ids(finish_all(on_gpu, greedy(6), stagger=2)) == expected


def test_batch_mates_and_chunks_change_no_bit(engines, finish_all):
    _, make = engines
    alone = make(max_running=1, prefix_cache=False)
    expected = {}
    for request in greedy(4):
        expected |= finish_all(alone, [request])
    together = finish_all(make(max_batched_tokens=24, mixed_prefill_tokens=7), greedy(4), stagger=1)
    for key, update in together.items():
        assert update.tokens == expected[key].tokens


def test_preempted_sequences_go_on_as_if_nothing_had_been(engines, finish_all):
    """Their KV goes to main memory and back."""
    _, make = engines
    block_bytes = make().backend.info.kv_bytes_per_token * BLOCK_SIZE
    requests = greedy(4, tokens=40)
    expected = token_ids(finish_all(make(), requests))
    small = make(kv_cache_gib=10.5 * block_bytes / 2**30, max_context=128, prefix_cache=False)
    preempted, preempt = [], small._scheduler._preempt
    small._scheduler._preempt = lambda *args: (preempted.append(args), preempt(*args))
    assert token_ids(finish_all(small, requests)) == expected
    assert preempted


def test_the_log_says_what_computes(native_engine, cuda, caplog):
    caplog.set_level(logging.INFO, "sparserve")
    info = native_engine(backend="auto", device=cuda).backend.info
    assert f"backend cuda on {info.device}, " in caplog.text
    warned = [r.message for r in caplog.records if "the emulator" in r.message]
    assert len(warned) == (EMULATED in os.environ)


def test_steps_that_come_again_are_graphs(native_engine, finish_all, cuda):
    make = partial(native_engine, backend="auto", device=cuda, dtype="int8")
    engine = make()
    found = token_ids(finish_all(engine, greedy(3, tokens=8)))
    captures, launches, _, why_not = engine.backend._decoder.graphs()
    assert 0 < captures < launches
    assert not why_not
    plain = make(cuda_graphs=False)
    assert token_ids(finish_all(plain, greedy(3, tokens=8))) == found
    assert plain.backend._decoder.graphs()[:2] == (0, 0)


def test_the_log_says_once_why_there_are_no_graphs(native_engine, finish_all, cuda, caplog):
    if EMULATED not in os.environ:
        pytest.skip("a GPU makes them")
    engine = native_engine(backend="auto", device=cuda)
    load("emulator").sk_emulator_fail_graph(2)
    finish_all(engine, greedy(2, tokens=6))
    told = [r.message for r in caplog.records if "without CUDA graphs" in r.message]
    assert len(told) == 1
    assert told[0].endswith("GPU 0, emulator: making a graph: fails as a test asked for")
