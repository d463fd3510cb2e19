"""A prompt found in the cache gives the same bits as one computed whole."""

import random
from dataclasses import replace

import pytest

from sparserve.engine.request import (
    GenerationRequest,
    OutputParams,
    SamplingParams,
    StoppingParams,
)

BLOCK = 16


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    source = random.Random(seed)
    return tuple(source.randrange(256) for _ in range(length))


def asking(key: str, prompt: tuple[int, ...], **fields: object) -> GenerationRequest:
    return GenerationRequest(
        key,
        prompt,
        SamplingParams(seed=3),
        StoppingParams(max_tokens=20, ignore_eos=True),
        OutputParams(top_logprobs=3),
        **fields,
    )


@pytest.mark.parametrize("shared", [15, 16, 17, 63, 64, 65, 100, 159, 160])
def test_a_hit_gives_the_bits_of_a_whole_prefill(any_engine, finish_all, shared):
    common, rest = prompt_of(shared), prompt_of(160 - shared, 1)
    second = asking("second", common + rest, report_statistics=True)
    engine = any_engine()
    finish_all(engine, [asking("first", common + prompt_of(30, 2), report_statistics=True)])
    warm = finish_all(engine, [second])["second", 0]
    cold = finish_all(any_engine(prefix_cache=False), [second])["second", 0]
    assert warm.finish.cached_tokens == min(shared, 159) // BLOCK * BLOCK
    assert cold.finish.cached_tokens == 0
    assert warm.tokens == cold.tokens, "ids and log-probabilities, to the bit"
    assert warm.finish.core_share == cold.finish.core_share


def statistics_sums(engine, monkeypatch, finish_all, request):
    """The whole statistics that a request ended with."""
    from sparserve.engine.sequence import Sequence

    kept, real = [], Sequence.finish

    def finish(self, *args, **kwargs):
        kept.append(self.statistics.total())
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Sequence, "finish", finish)
        finish_all(engine, [request])
    return kept[0]


@pytest.mark.parametrize("budget", [512, 40])
def test_statistics_of_cached_and_computed_blocks_add_up_to_the_same(
    any_engine, monkeypatch, finish_all, budget
):
    common = prompt_of(90)
    second = asking("second", common + prompt_of(41, 1), report_statistics=True)
    engine = any_engine(max_batched_tokens=budget)
    finish_all(engine, [asking("first", common, report_statistics=True)])
    warm = statistics_sums(engine, monkeypatch, finish_all, second)
    cold = statistics_sums(any_engine(prefix_cache=False), monkeypatch, finish_all, second)
    assert warm.tokens == cold.tokens == 130  # all but the first
    assert (warm.sums == cold.sums).all()


def test_blocks_without_statistics_are_computed_again_for_who_wants_them(any_engine, finish_all):
    prompt = prompt_of(100)
    engine = any_engine()
    cached = []
    for key, wants in (("a", False), ("b", True), ("c", True), ("d", False)):
        request = asking(key, prompt, report_statistics=wants)
        cached.append(finish_all(engine, [request])[key, 0].finish.cached_tokens)
    assert cached == [0, 0, 96, 96]


def test_salts_keep_tenants_apart(any_engine, finish_all):
    engine = any_engine()
    cached = []
    for key, salt in (("a", "x"), ("b", "y"), ("c", ""), ("d", "x")):
        request = asking(key, prompt_of(80), cache_salt=salt)
        cached.append(finish_all(engine, [request])[key, 0].finish.cached_tokens)
    assert cached == [0, 0, 0, 64]


def test_decoded_tokens_are_not_taken_from_the_cache(any_engine, finish_all):
    """Decode's numerics are not prefill's: the answer is computed again as part of the next prompt."""
    engine = any_engine()
    first = finish_all(engine, [asking("first", prompt_of(30))])["first", 0]
    conversation = prompt_of(30) + tuple(token.id for token in first.tokens) + prompt_of(5, 9)
    second = asking("second", conversation)
    warm = finish_all(engine, [second])["second", 0]
    assert warm.finish.cached_tokens == 16
    assert warm.tokens == finish_all(any_engine(), [second])["second", 0].tokens


def test_hits_are_counted_in_tokens(any_engine, finish_all):
    engine = any_engine()
    for key in "ab":
        finish_all(engine, [asking(key, prompt_of(70))])
    assert engine.metrics.prefix_cache_queries._value.get() == 2 * 64
    assert engine.metrics.prefix_cache_hits._value.get() == 64


@pytest.mark.parametrize("seed", range(6))
def test_a_crowd_with_common_beginnings_gets_what_each_gets_alone(any_engine, finish_all, seed):
    """Small pool: prompts are shared, evicted, preempted, found again."""
    source = random.Random(seed)
    stems = [prompt_of(source.choice([20, 48, 70]), stem) for stem in range(3)]
    requests = [
        replace(
            asking(str(i), source.choice(stems) + prompt_of(source.randint(0, 30), 100 + i)),
            sampling=SamplingParams(seed=i, n=source.choice([1, 1, 2])),
            report_statistics=source.random() < 0.5,
            cache_salt=source.choice(["", "", "tenant"]),
        )
        for i in range(10)
    ]
    engine = any_engine(max_context=144, max_running=4, kv_cache_gib=0.0003, max_batched_tokens=50)
    crowd = finish_all(engine, requests, stagger=3)
    quiet = any_engine(prefix_cache=False)
    for request in requests:
        alone = finish_all(quiet, [request])
        for (key, choice), update in alone.items():
            assert crowd[key, choice].tokens == update.tokens
            assert crowd[key, choice].text == update.text
            assert crowd[key, choice].finish.core_share == update.finish.core_share
    assert engine.metrics.prefix_cache_hits._value.get() > 0
