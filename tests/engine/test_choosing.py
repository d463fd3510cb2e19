"""Neurons chosen for a request: from its own prompt, whatever else the engine is doing."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from sparse_kernels.choice import ALL_NEURONS, ChoiceKind, NeuronChoice, Score, core_words
from sparserve.config import EngineSettings
from sparserve.engine.choosing import ChoiceState, neurons_name
from sparserve.engine.formats import weight_formats
from sparserve.engine.request import (
    GenerationRequest,
    OutputParams,
    SamplingParams,
    StoppingParams,
)
from sparserve.model.backend import BackendInfo, ForwardBatch, NeuronReads
from sparserve.sparsity.chooser import ChoicePlan, Chosen
from sparserve.sparsity.policy import DENSE, DraftKind, Policy, PolicyKind, PredictorKind
from sparserve.sparsity.statistics import NeuronStatistics, PromptStatistics

NEURONS = 96  # of each of the tiny model's 2 layers
CORE = Policy(PolicyKind.CORE, 0.5)
GATE = Policy(PolicyKind.TOKEN, 0.7, choice=ChoiceKind.GATE)
POLICIES = [
    DENSE,
    CORE,
    replace(CORE, density=0.3, predictor=PredictorKind.STABILITY),
    replace(CORE, predictor=PredictorKind.SIMILARITY),
    replace(CORE, score=Score.COUNT, predictor=PredictorKind.STABILITY),
    replace(CORE, score=Score.SIGNED_COUNT, alpha=0.3, predictor=PredictorKind.STABILITY),
    replace(CORE, density=0.7, first_layer=1),
    GATE,
    replace(GATE, density=0.45, core_density=0.5),
    Policy(PolicyKind.AUTO, target_kl=0.2),
    replace(CORE, refresh_interval=5),
    replace(GATE, refresh_interval=4),
    Policy(PolicyKind.EXACT),
    Policy(PolicyKind.EXACT, draft=DraftKind.CORE, draft_tokens=2),
]
# Weights and how they are stored, by name.
NATIVE = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8 in planes": {"dtype": "int8", "weight_planes": "4+4"},
}


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    source = random.Random(seed)
    return tuple(source.randrange(256) for _ in range(length))


def asking(key: str, prompt, policy: Policy, n: int = 1, max_tokens: int = 20, **fields):
    return GenerationRequest(
        key,
        tuple(prompt),
        SamplingParams(seed=7, n=n),
        StoppingParams(max_tokens=max_tokens, ignore_eos=True),
        OutputParams(top_logprobs=2),
        policy=policy,
        **fields,
    )


def outcome(update):
    """All that a choice says and used, without clock and cache. How drafts went, and in how many steps a
    dense pass was made, depends on what else was there to do."""
    report = update.finish.sparsity
    if report.policy is PolicyKind.EXACT or report.refreshes:
        report = replace(report, mlp_bytes=0, other_bytes=0, drafted_tokens=0, accepted_tokens=0)
    return update.tokens, update.text, report, update.finish.core_share


@pytest.fixture
def engine_of(tiny_engine, tiny_index):
    return lambda **settings: tiny_engine(index=str(tiny_index), **settings)


@pytest.fixture(params=["reference", *NATIVE])
def any_engine_of(request, engine_of, native_engine, index_file):
    """The same on each backend in turn, and the policies that it can follow."""
    if request.param == "reference":
        return engine_of, POLICIES
    formats = NATIVE[request.param]
    settings = EngineSettings(backend="cpu", **formats)
    has_planes = "planes" in request.param
    index = index_file(str(weight_formats(settings)), planes=has_planes)
    planes = replace(GATE, density=0.65, choice=ChoiceKind.PLANES)
    make = partial(native_engine, index=str(index), **formats)
    return make, POLICIES + [planes, replace(planes, core_density=0.5)] * has_planes


@pytest.fixture
def alone(engine_of, finish_all):
    """Each choice of each request, with the engine to itself."""

    def run(requests, make=engine_of):
        engine = make(prefix_cache=False, max_running=1)
        found = [finish_all(engine, [request]) for request in requests]
        return {key: outcome(update) for results in found for key, update in results.items()}

    return run


def mixed_requests(count: int, policies: list[Policy]) -> list[GenerationRequest]:
    source = random.Random(5)
    stems = [prompt_of(length, 9) for length in (0, 20, 48, 100)]
    requests = []
    for number in range(count):
        prompt = source.choice(stems) + prompt_of(source.randint(2, 40), source.randrange(4))
        policy = policies[number % len(policies)]
        n, tokens = source.choice([1, 1, 3]), source.randint(1, 30)
        report = source.random() < 0.2
        requests.append(asking(str(number), prompt, policy, n, tokens, report_statistics=report))
    return requests


# Of the engine, then steps between two requests.
SCHEDULES = {
    "at once": ({}, 0),
    "in small chunks": (
        {"max_batched_tokens": 24, "max_running": 5, "mixed_prefill_tokens": 7},
        2,
    ),
    "preempted": ({"max_running": 8, "max_context": 160, "kv_cache_gib": 0.0001}, 1),
    "not cached": ({"prefix_cache": False}, 3),
}


def test_a_policy_of_any_kind_gets_what_it_gets_alone(any_engine_of, alone, finish_all):
    make, policies = any_engine_of
    requests = mixed_requests(2 * len(policies), policies)
    expected = alone(requests, make)
    for name, (settings, stagger) in SCHEDULES.items():
        requests.reverse()  # another order each time
        engine = make(**settings)
        for key, update in finish_all(engine, requests, stagger).items():
            assert outcome(update) == expected[key], (name, key)
        hits = engine.metrics.prefix_cache_hits._value.get()
        assert (hits > 0) == settings.get("prefix_cache", True)
        assert (engine.metrics.preemptions._value.get() > 0) == (name == "preempted")


def test_policies_differ_in_what_they_say(alone):
    """Or the test above would compare dense with dense."""
    requests = [asking(str(i), prompt_of(40), policy) for i, policy in enumerate(POLICIES)]
    results = alone(requests)
    said = {key: repr(tokens) for (key, _), (tokens, *_) in results.items()}
    like_dense = [i for i, policy in enumerate(POLICIES) if said[str(i)] == said["0"]]
    assert [POLICIES[i].kind for i in like_dense[1:]] == [PolicyKind.EXACT] * 2
    assert len(set(said.values())) == len(POLICIES) - 2


def test_density_1_is_dense_to_the_bit(engine_of, finish_all):
    requests = [
        asking("dense", prompt_of(40), DENSE),
        asking("core", prompt_of(40), replace(CORE, density=1.0)),
    ]
    results = finish_all(engine_of(), requests)
    dense, core = results["dense", 0], results["core", 0]
    assert dense.tokens == core.tokens
    assert core.finish.sparsity.density == dense.finish.sparsity.density == 1
    assert core.finish.sparsity.mlp_bytes == dense.finish.sparsity.mlp_bytes


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("length", [9, 40])
def test_the_choices_of_a_request_share_one_set_and_one_gathering(
    engine_of, finish_all, monkeypatch, length, prefix_cache
):
    engine = engine_of(prefix_cache=prefix_cache)
    gathered, cores, real = [], set(), engine.backend.forward

    def forward(batch: ForwardBatch):
        gathered.extend(s for s in batch.sequences if s.collect_statistics)
        cores.update(id(s.choice) for s in batch.sequences if not s.choice.is_dense)
        return real(batch)

    monkeypatch.setattr(engine.backend, "forward", forward)
    several = finish_all(engine, [asking("a", prompt_of(length), CORE, n=3)])
    assert sum(len(s.token_ids) for s in gathered) == length
    assert len(cores) == 1
    (one,) = finish_all(engine_of(), [asking("a", prompt_of(length), CORE)]).values()
    assert outcome(several["a", 0]) == outcome(one)
    assert len({update.tokens for update in several.values()}) == 3


def test_what_is_read_is_counted(engine_of, finish_all):
    engine = engine_of()
    info, policies = engine.backend.info, (DENSE, CORE, GATE)
    requests = [asking(p.kind.value, prompt_of(40), p) for p in policies]
    results = finish_all(engine, requests)
    dense, core, token = (results[p.kind.value, 0].finish.sparsity for p in policies)
    # 19 steps over 41 .. 59 positions, the new one with them; the first token is the prefill's
    kv = info.kv_bytes_per_token * sum(range(41, 60))
    others = 19 * (info.weight_bytes - info.mlp_bytes)
    for report in (dense, core, token):
        assert report.decoded_tokens == 19
        assert report.other_bytes == kv + others
    assert dense.mlp_bytes == 19 * info.mlp_bytes
    assert dense.bytes_per_token == info.weight_bytes + kv / 19
    assert (dense.dense_share, core.dense_share) == (1, 0)
    # shares of .4 and .6 of 96 neurons are 38 and 58
    assert core.density == 96 / 192
    row, correction = 64 * 4, 2 * 2 * 3 * 64 * 2
    gates = 2 * NEURONS * row + correction
    used = (token.mlp_bytes / 19 - gates) / (2 * row)
    assert 0.3 * 2 * NEURONS < used < 0.9 * 2 * NEURONS
    assert round(used * 19) == pytest.approx(used * 19), "whole neurons"
    assert (core.predicted_kl, token.predicted_kl) == pytest.approx((0.4, 0.1))
    assert 0.5 < core.coverage < 1
    assert token.coverage is None


def test_one_token_and_no_decode_step(engine_of, finish_all):
    (update,) = finish_all(engine_of(), [asking("a", prompt_of(9), CORE, max_tokens=1)]).values()
    report = update.finish.sparsity
    assert (report.density, report.bytes_per_token, report.decoded_tokens) == (0.5, 0, 0)


def test_a_request_of_one_token_goes_by_the_prior_where_there_is_one(engine_of, alone, finish_all):
    request = asking("a", [65], CORE)
    (update,) = finish_all(engine_of(), [request]).values()
    assert outcome(update) == alone([request])["a", 0]
    assert update.finish.sparsity.coverage is None


def test_metrics_tell_density_coverage_union_and_policy(engine_of, finish_all):
    engine = engine_of()
    finish_all(engine, [asking(str(i), prompt_of(40, i), CORE) for i in range(3)])
    finish_all(engine, [asking("dense", prompt_of(40), DENSE)])
    metrics = engine.metrics
    assert metrics.density._sum.get() == pytest.approx(1.5)
    assert metrics.policies.labels("core")._value.get() == 3
    assert metrics.policies.labels("dense")._value.get() == 1
    assert 1.5 < metrics.coverage._sum.get() < 3
    steps = sum(bucket.get() for bucket in metrics.union_share._buckets)
    assert steps == 19
    assert 0.5 < metrics.union_share._sum.get() / steps < 0.95, "larger than one of the cores"


def test_blocks_are_named_for_what_was_read():
    members = torch.zeros(2, NEURONS, dtype=torch.bool)
    members[:, :7] = True
    core = NeuronChoice(core_words(members))
    same = NeuronChoice(core_words(members.clone()))
    members[1, 90] = True
    other = NeuronChoice(core_words(members))
    thresholds = torch.full((2, 3), 0.25)
    gate = NeuronChoice(None, ChoiceKind.GATE, thresholds)
    names = [neurons_name(c) for c in (ALL_NEURONS, core, other, gate)]
    names.append(neurons_name(NeuronChoice(None, ChoiceKind.PLANES, thresholds)))
    names.append(neurons_name(NeuronChoice(None, ChoiceKind.GATE, thresholds, 1)))
    names.append(neurons_name(NeuronChoice(core.core, ChoiceKind.GATE, thresholds)))
    assert len(set(names)) == len(names)
    assert neurons_name(same) == neurons_name(core)
    assert names[0] == "all"


NEURON_BYTES = {None: torch.tensor([[1.0, 2, 0, 0]])}
INFO = BackendInfo("", "", "", 1, frozenset(), 10, 8, NEURON_BYTES, 0, "", 1)


class Plan(ChoicePlan):
    """Whose core is the first neurons of one layer of 10, and holds .8 of any score."""

    def choose(self, prompt) -> Chosen:
        if self.policy.kind is PolicyKind.DENSE:
            return Chosen(ALL_NEURONS, None, None)
        members = torch.arange(10)[None] < round(10 * self.density)
        return Chosen(NeuronChoice(core_words(members)), 0.8, True)


def plan_of(policy: Policy) -> Plan:
    return Plan(policy, policy.density or 1.0, score=Score.NORM)


def test_drift_takes_more_neurons_the_second_time_and_in_the_end_all():
    """Every pass holds so much of the score in neuron 0, which is in the core, and the rest in the last."""
    policy = Policy(PolicyKind.CORE, 0.6, refresh_interval=16)
    state = ChoiceState(plan_of(policy), INFO, plan_of)
    state.choose(PromptStatistics(16))
    densities = []
    for number, held in enumerate((0.75, 0.69, 0.75, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)):
        sums = torch.zeros(1, 10, dtype=torch.int64)
        sums[0, 0], sums[0, 9] = int(held * 2**32), int((1 - held) * 2**32)
        state.take_refreshed(16 * number, [NeuronStatistics(sums, 16)])
        state.refreshed()
        densities.append(state.plan.density)
        if state.choice.is_dense:
            break
    assert densities == [0.6, 0.6, 0.6, 0.6, 0.7, 0.7, 0.8, 0.8, 1.0]
    state.count_pass(state.choice, None, 1)
    state.count_token()
    report = state.report(refreshes=9, drafted=0, accepted=0)
    assert (report.fallbacks, report.policy, report.dense_share) == (1, PolicyKind.CORE, 1)


def test_a_pass_over_several_tokens_reads_all_neurons_once():
    state = ChoiceState(plan_of(CORE), INFO, plan_of)
    state.choose(None)
    state.count_pass(ALL_NEURONS, None, 3)
    counts = torch.tensor([[4, 2, 2, 2]])
    state.count_pass(state.choice, NeuronReads(counts, 1), 4)
    state.count_token()
    report = state.report(refreshes=1, drafted=0, accepted=0)
    assert report.mlp_bytes == 8 + (4 * 1 + 2 * 2)
    assert report.other_bytes == 2 * 2 + 7
    assert report.density == 2
    assert report.dense_share == 0, "the token is the last one's"
