"""Dense passes over decoded tokens: where they are, and that nobody else decides it."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_kernels.choice import ChoiceKind, core_members
from sparserve.engine.refresh import Refresh
from sparserve.engine.request import GenerationRequest, SamplingParams, StoppingParams
from sparserve.model.backend import BLOCK_SIZE, ForwardBatch, Phase, SequenceInput
from sparserve.sparsity.policy import DENSE, Policy, PolicyKind
from sparserve.sparsity.statistics import PromptStatistics


def core(interval: int, density: float = 0.5) -> Policy:
    return Policy(PolicyKind.CORE, density=density, refresh_interval=interval)


POLICIES = [
    core(1),
    Policy(PolicyKind.TOKEN, 0.7, choice=ChoiceKind.GATE),
    Policy(PolicyKind.TOKEN, 0.45, choice=ChoiceKind.GATE, core_density=0.5),
]


def random_requests(
    seed: int, count: int, policy: Policy, least_tokens: int = 5
) -> list[GenerationRequest]:
    source = random.Random(seed)
    return [
        GenerationRequest(
            str(i),
            tuple(source.randrange(256) for _ in range(source.choice([2, 15, 16, 40]))),
            SamplingParams(source.choice([0.0, 0.8]), seed=i, n=source.choice([1, 1, 2])),
            StoppingParams(max_tokens=source.randint(least_tokens, 50), ignore_eos=True),
            policy=policy,
        )
        for i in range(count)
    ]


@given(st.integers(0, 50), st.integers(1, 9), st.data())
def test_passes_follow_one_another_without_a_gap(first, interval, data):
    refresh, passes = Refresh(interval, first), []
    for position in range(first, first + 40):
        if position != refresh.due:
            continue
        begin = refresh.reached
        while refresh.reached <= position:
            refresh.advance(data.draw(st.integers(1, position + 1 - refresh.reached)))
        passes.append(range(begin, position + 1))
    assert [p for one in passes for p in one] == list(
        range(first, first + 40 // interval * interval)
    )
    assert {len(one) for one in passes} == {interval}
    assert refresh.passes == len(passes)


@pytest.mark.parametrize("interval", [1, 2, 3, 7, 16])
def test_refresh_at_density_1_equals_dense(any_engine, finish_all, interval):
    requests = random_requests(interval, 5, core(interval, density=1.0))
    wanted = finish_all(any_engine(), [replace(r, policy=DENSE) for r in requests])
    made = finish_all(any_engine(max_running=3), requests)
    for key, update in wanted.items():
        assert made[key].tokens == update.tokens
        decoded = len(update.tokens) - 1
        assert made[key].finish.sparsity.refreshes == decoded // interval


def test_a_pass_in_every_step_is_dense(any_engine, finish_all):
    """Whatever the core."""
    requests = random_requests(1, 4, core(1, density=0.2))
    wanted = finish_all(any_engine(), [replace(r, policy=DENSE) for r in requests])
    made = finish_all(any_engine(), requests)
    assert all(made[key].tokens == update.tokens for key, update in wanted.items())


@pytest.mark.parametrize("seed", range(4))
def test_the_output_is_that_of_the_request_alone(small_pool, finish_all, seed):
    source = random.Random(seed)
    policy = replace(source.choice(POLICIES), refresh_interval=source.choice([3, 5, 20]))
    requests = random_requests(seed, 6, policy, 45)
    alone = {}
    for request in requests:
        alone |= finish_all(small_pool(8, 1, 64), [request])
    # A budget of one token beside those of the others cuts passes into many steps.
    engine = small_pool(9, 4, source.choice([5, 16]))
    together = finish_all(engine, requests, stagger=2)
    assert engine.metrics.preemptions._value.get() > 0
    for key, update in alone.items():
        own = together[key]
        assert own.tokens == update.tokens
        assert own.finish.sparsity.refreshes == update.finish.sparsity.refreshes
        assert own.finish.sparsity.coverage == update.finish.sparsity.coverage


@pytest.fixture
def decode_steps(tiny_engine, finish_all, monkeypatch):
    """-> (what one request alone decodes with, step by step, and its report)"""

    def run(policy: Policy, max_tokens: int):
        engine = tiny_engine()
        forward, seen = engine.backend.forward, []

        def noted(batch):
            seen.extend(s for s in batch.sequences if s.phase is Phase.DECODE)
            return forward(batch)

        monkeypatch.setattr(engine.backend, "forward", noted)
        prompt = tuple(random.Random(0).randrange(256) for _ in range(20))
        stopping = StoppingParams(max_tokens=max_tokens, ignore_eos=True)
        request = GenerationRequest("a", prompt, SamplingParams(0), stopping, policy=policy)
        (update,) = finish_all(engine, [request]).values()
        return seen, update.finish.sparsity

    return run


def test_passes_are_dense_in_between_is_not_and_the_core_changes(decode_steps, monkeypatch):
    monkeypatch.setattr("sparserve.engine.choosing.DRIFT", 1.0)  # never
    seen, report = decode_steps(core(4), 13)
    assert [(s.start, len(s.token_ids)) for s in seen] == [
        (20, 1), (21, 1), (22, 1), (20, 4), (24, 1), (25, 1), (26, 1), (24, 4), (28, 1), (29, 1),
        (30, 1), (28, 4),
    ]  # fmt: skip
    passes = [s for s in seen if len(s.token_ids) > 1]
    assert all(s.choice.is_dense and s.collect_statistics for s in passes)
    cores = [s.choice.core for s in seen if len(s.token_ids) == 1]
    assert all(own is not None for own in cores)
    assert (cores[0] == cores[2]).all()
    assert not (cores[2] == cores[3]).all()
    assert report.refreshes == 3
    # Nine tokens with half of the neurons and three dense passes, for twelve tokens.
    assert report.density == pytest.approx((9 * 0.5 + 3) / 12)


def test_the_core_is_that_of_prompt_and_output_so_far(decode_steps, tiny_engine, monkeypatch):
    """After passes over all decoded tokens it is the core of a prompt that they are part of."""
    monkeypatch.setattr("sparserve.engine.choosing.DRIFT", 1.0)
    seen, _ = decode_steps(core(4), 13)
    tokens = tuple(random.Random(0).randrange(256) for _ in range(20))
    for step in seen:
        if len(step.token_ids) == 4:
            tokens += tuple(step.token_ids)
    engine = tiny_engine()
    item = SequenceInput(tokens, 0, (0, 1), Phase.PREFILL, collect_statistics=True)
    prompt = PromptStatistics(BLOCK_SIZE)
    prompt.extend(0, engine.backend.forward(ForwardBatch([item])).statistics[0])
    wanted = engine.policies.plan(core(4)).choose(prompt).choice.core
    own = decode_steps(core(4), 14)[0][-1].choice.core
    differing = core_members(own, 96) ^ core_members(wanted, 96)
    assert differing.float().mean() < 0.03, "prefill and decode round differently"


def test_drift_raises_the_density_and_ends_dense(decode_steps, monkeypatch):
    monkeypatch.setattr("sparserve.engine.choosing.DRIFT", -2.0)  # always
    seen, report = decode_steps(core(2, density=0.65), 40)
    sizes = [
        1.0 if s.choice.core is None else core_members(s.choice.core, 96).float().mean().item()
        for s in seen
        if len(s.token_ids) == 1
    ]
    # The second time in a row more is read.
    assert sizes[:6] == pytest.approx([0.65] * 2 + [0.75] * 2 + [0.85] * 2, abs=0.01)
    assert set(sizes[6:]) == {1.0}
    assert report.fallbacks == 1
    assert report.refreshes == 6, "none where all is dense"
