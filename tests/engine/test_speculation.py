"""Drafts change how soon tokens come, never which."""

import asyncio
import functools
import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_kernels.choice import ChoiceKind
from sparserve.config import EngineSettings
from sparserve.engine.block_manager import blocks_for
from sparserve.engine.constraint import Constraint, ConstraintKind
from sparserve.engine.formats import weight_formats
from sparserve.engine.grammar import ConstraintCompiler
from sparserve.engine.request import (
    GenerationRequest,
    OutputParams,
    SamplingParams,
    StoppingParams,
)
from sparserve.engine.speculation import MAX_NGRAM, WEAK_DRAFTS, Ngrams, Speculation
from sparserve.model.backend import ForwardBatch, Phase, SequenceInput
from sparserve.sparsity.policy import DENSE, DraftKind, Policy, PolicyKind

NGRAM = Policy(PolicyKind.EXACT, draft=DraftKind.NGRAM, draft_tokens=8)
CORE = Policy(PolicyKind.EXACT, draft=DraftKind.CORE, draft_tokens=4, density=0.7)
TOKEN = Policy(PolicyKind.EXACT, draft=DraftKind.TOKEN, draft_tokens=3, choice=ChoiceKind.GATE)
POLICIES = [NGRAM, CORE, replace(TOKEN, density=0.7), replace(TOKEN, density=0.4)]


def plain_ngrams(text: list[int], count: int) -> list[int]:
    """Prompt lookup by its words: the longest end that stands elsewhere, its latest place, what follows."""
    for length in range(MAX_NGRAM, 0, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if len(text) > length and text[end - length : end] == text[-length:]:
                limit = count if length > 1 else min(count, WEAK_DRAFTS)
                repeated = text[end:] * (1 + limit)
                return repeated[:limit]
    return []


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.lists(st.integers(0, 3), max_size=20),
    st.integers(0, 9),
)
def test_ngrams_propose_what_followed_the_longest_known_end(prompt, output, count):
    drafter = Ngrams(prompt, 20)
    for length in range(len(output) + 1):
        proposed = drafter.propose(output[:length], count)
        assert proposed == plain_ngrams(prompt + output[:length], count)


def random_request(source: random.Random, key: str, policy: Policy) -> GenerationRequest:
    """Of few different tokens, so that texts repeat and drafts are often right, and often wrong."""
    letters = source.sample(range(256), source.choice([2, 4, 12]))
    prompt = tuple(source.choice(letters) for _ in range(source.choice([2, 15, 16, 40])))
    sampling = SamplingParams(
        temperature=source.choice([0.0, 0.0, 0.6, 1.0]),
        top_k=source.choice([0, 0, 5]),
        top_p=source.choice([1.0, 0.9]),
        seed=source.randrange(1000),
        n=source.choice([1, 1, 3]),
        repetition_penalty=source.choice([1.0, 1.0, 1.3]),
        frequency_penalty=source.choice([0.0, 0.0, 0.4]),
        logit_bias=source.choice([(), ((letters[0], 4.0), (letters[1], 3.5))]),
        allowed_token_ids=source.choice([(), (), (*letters, 257)]),
    )
    stopping = StoppingParams(
        max_tokens=source.choice([1, 2, 30, 45]),
        min_tokens=source.choice([0, 1]),
        stop=source.choice([(), (chr(33 + letters[0] % 90),)]),
        stop_token_ids=source.choice([(), (letters[0],)]),
    )
    output = OutputParams(top_logprobs=source.choice([0, 2]))
    return GenerationRequest(key, prompt, sampling, stopping, output, policy=policy)


def assert_equal_results(made, wanted):
    assert made.keys() == wanted.keys()
    for key, update in wanted.items():
        own = made[key]
        assert own.tokens == update.tokens, "ids and log-probabilities, bit for bit"
        assert own.text == update.text
        ends = [
            (u.finish.reason, u.finish.stop_string, u.finish.stop_token_id) for u in (own, update)
        ]
        assert ends[0] == ends[1]


def dense_of(requests: list[GenerationRequest]) -> list[GenerationRequest]:
    return [replace(request, policy=DENSE) for request in requests]


@pytest.mark.parametrize("seed", range(4))
def test_exact_equals_dense(any_engine, finish_all, seed):
    source = random.Random(seed)
    requests = [random_request(source, str(i), source.choice(POLICIES)) for i in range(8)]
    settings = source.choice([{}, {"max_running": 4, "max_batched_tokens": 6}])
    wanted = finish_all(any_engine(max_running=3), dense_of(requests))
    assert_equal_results(finish_all(any_engine(**settings), requests, stagger=2), wanted)


@pytest.mark.parametrize(
    "formats",
    [
        {"dtype": "int8", "weight_planes": "4+4"},
        {"dtype": "int4", "lm_head_dtype": "int8"},
        {"dtype": "bfloat16", "lm_head_dtype": "int4+exact"},
    ],
    ids=["int8 in planes", "int4", "scan"],
)
def test_exact_equals_dense_in_each_format(native_engine, index_file, finish_all, formats):
    """One token or several: the kernels for few tokens and for many give equal bits."""
    planes = "weight_planes" in formats
    named = str(weight_formats(EngineSettings(backend="cpu", **formats)))
    own = replace(TOKEN, density=0.65, choice=ChoiceKind.PLANES) if planes else POLICIES[2]
    source = random.Random(4)
    requests = [
        random_request(source, str(i), source.choice([NGRAM, CORE, own])) for i in range(10)
    ]
    index = str(index_file(named, planes=planes))
    wanted = finish_all(native_engine(index=index, **formats), dense_of(requests))
    made = finish_all(native_engine(index=index, **formats), requests, stagger=2)
    assert_equal_results(made, wanted)


@pytest.fixture
def speculations(monkeypatch) -> list[Speculation]:
    """All that are made, in order."""
    made, real = [], Speculation.__init__

    def note(self, *args, **kwargs):
        real(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Speculation, "__init__", note)
    return made


@pytest.mark.parametrize("seed", range(4))
def test_exact_equals_dense_in_a_pool_that_is_too_small(small_pool, finish_all, speculations, seed):
    source = random.Random(seed)
    requests = [
        GenerationRequest(
            str(i),
            tuple(source.choice((7, 8, 9)) for _ in range(source.randint(2, 60))),
            SamplingParams(source.choice([0.0, 0.7]), seed=i, logit_bias=((7, 9.0), (8, 9.0))),
            StoppingParams(max_tokens=source.randint(30, 80), ignore_eos=True),
            policy=source.choice([*POLICIES, DENSE]),
        )
        for i in range(7)
    ]
    wanted = finish_all(small_pool(8, 1, 64), dense_of(requests))
    engine = small_pool(9, 4, source.choice([5, 12, 40]))
    assert_equal_results(finish_all(engine, requests, stagger=2), wanted)
    assert engine.metrics.preemptions._value.get() > 0
    assert sum(own.accepted_tokens for own in speculations) > 20


class Told(Ngrams):
    """Drafts from a text that is told beforehand."""

    text: tuple[int, ...] = ()
    wrong: bool = False

    def propose(self, output, count):
        following = self.text[len(output) : len(output) + count]
        return [(token + 1) % 256 if self.wrong else token for token in following]


@pytest.mark.parametrize("wrong", [True, False])
def test_drafts_that_are_always_right_or_wrong_cost_nothing_but_steps(
    tiny_engine, finish_all, speculations, monkeypatch, wrong
):
    request = GenerationRequest(
        "a",
        tuple(range(20)),
        SamplingParams(seed=3),
        StoppingParams(max_tokens=61, ignore_eos=True),
        policy=NGRAM,
    )
    wanted = finish_all(tiny_engine(), dense_of([request]))
    Told.text, Told.wrong = tuple(t.id for t in wanted["a", 0].tokens), wrong
    monkeypatch.setattr("sparserve.engine.speculation.Ngrams", Told)
    engine = tiny_engine()
    steps, forward = [], engine.backend.forward

    def counted(batch):
        steps.append(batch)
        return forward(batch)

    monkeypatch.setattr(engine.backend, "forward", counted)
    assert_equal_results(finish_all(engine, [request]), wanted)
    (own,) = speculations
    if wrong:
        assert (own.accepted_tokens, len(steps)) == (0, 61)
    else:
        # One by the prompt; then 8 drafts and a token of the verification's own, and at last what fits.
        assert len(steps) == 1 + -(-60 // 9)
        assert own.accepted_tokens == own.drafted_tokens == 60 - (len(steps) - 1)


def test_drafts_keep_to_the_budget_of_a_step_and_to_free_blocks(small_pool, monkeypatch):
    monkeypatch.setattr(
        "sparserve.engine.speculation.Ngrams.propose", lambda self, output, n: [1] * n
    )
    engine = small_pool(8, 2, 6)
    forward, seen = engine.backend.forward, []

    def checked(batch):
        seen.append([len(s.token_ids) for s in batch.sequences])
        for sequence in batch.sequences:
            assert blocks_for(sequence.start + len(sequence.token_ids)) <= len(sequence.block_table)
            assert sequence.start + len(sequence.token_ids) < 128
        return forward(batch)

    monkeypatch.setattr(engine.backend, "forward", checked)
    for key in "ab":
        stopping = StoppingParams(max_tokens=400, ignore_eos=True)
        engine.add(GenerationRequest(key, (1,) * 60, SamplingParams(0), stopping, policy=NGRAM))
    while engine.has_work:
        engine.step()
    assert all(sum(counts) <= 6 for counts in seen)
    assert [1, 5] in seen or [5, 1] in seen


def logits_after(engine, text):
    item = SequenceInput(text, 0, (0,), Phase.PREFILL, output_offsets=(len(text) - 1,))
    return engine.backend.forward(ForwardBatch([item])).candidates.full_logits(0).double()


def test_drawn_tokens_have_the_dense_distribution(tiny_engine, finish_all, speculations):
    """Chi-square of three tokens in a row against the model's own probabilities."""
    prompt, engine = (65, 66, 65, 66, 65), tiny_engine(max_running=64)
    allowed = tuple(logits_after(engine, prompt).topk(4).indices.tolist())
    requests = [
        GenerationRequest(
            str(seed), prompt + allowed, SamplingParams(2.0, seed=seed, allowed_token_ids=allowed),
            StoppingParams(max_tokens=3, ignore_eos=True), policy=NGRAM,
        )
        for seed in range(1500)
    ]  # fmt: skip
    results = finish_all(engine, requests)
    drawn = Counter(tuple(t.id for t in results[r.request_id, 0].tokens) for r in requests)

    @functools.cache
    def probabilities(path):
        logits = logits_after(engine, (*prompt, *allowed, *path))[list(allowed)] / 2.0
        return dict(zip(allowed, logits.softmax(0).tolist(), strict=True))

    expected = {
        path: len(requests) * math.prod(probabilities(path[:i])[path[i]] for i in range(3))
        for path in itertools.product(allowed, repeat=3)
    }
    often = [path for path, count in expected.items() if count >= 5]
    cells = [(drawn[path], expected[path]) for path in often]
    cells.append(tuple(len(requests) - sum(column) for column in zip(*cells, strict=True)))
    statistic = sum((observed - wanted) ** 2 / wanted for observed, wanted in cells)
    freedom = len(cells) - 1
    assert freedom > 10
    assert statistic < freedom + 3 * math.sqrt(2 * freedom)
    assert sum(own.accepted_tokens for own in speculations) > 100


@pytest.fixture(scope="module")
def constraint(tiny_model):
    compiler = ConstraintCompiler(tiny_model.tokenizer, 259, [257])
    pattern = "(yes|no|yesterday)(, (yes|no|yesterday)){5,9}"
    yield asyncio.run(compiler.compile(Constraint(ConstraintKind.REGEX, pattern)))
    compiler.close()


@pytest.mark.parametrize("policy", [NGRAM, CORE], ids=["ngram", "core"])
def test_drafts_follow_a_constraint(tiny_engine, finish_all, constraint, speculations, policy):
    requests = [
        GenerationRequest(
            str(seed), (60, 61, 62), SamplingParams(temperature=seed % 2, seed=seed),
            StoppingParams(max_tokens=90), constraint=constraint, policy=policy,
        )
        for seed in range(6)
    ]  # fmt: skip
    wanted = finish_all(tiny_engine(), dense_of(requests))
    made = finish_all(tiny_engine(), requests)
    assert_equal_results(made, wanted)
    drafted, accepted = (
        sum(getattr(own, f"{name}_tokens") for own in speculations)
        for name in ("drafted", "accepted")
    )
    # The grammar leaves few choices; a draft that it forbids would never come out.
    assert accepted > 0.4 * drafted > 30


def test_a_choice_tells_how_its_drafts_went(tiny_engine, finish_all, speculations):
    request = GenerationRequest(
        "a", (5, 6) * 20, SamplingParams(0, logit_bias=((5, 40.0),)),
        StoppingParams(max_tokens=30, ignore_eos=True), policy=NGRAM,
    )  # fmt: skip
    (update,) = finish_all(tiny_engine(), [request]).values()
    (own,) = speculations
    report = update.finish.sparsity
    assert (report.drafted_tokens, report.accepted_tokens) == (
        own.drafted_tokens,
        own.accepted_tokens,
    )
    assert report.accepted_tokens > 20
    # Each verification reads everything once.
    steps = 29 - report.accepted_tokens
    assert report.density == pytest.approx(steps / 29)


def test_drafts_that_cannot_go_on_leave_the_choice_alone(tiny_engine, finish_all, monkeypatch):
    """Logits of a draft that are not finite say nothing of the dense ones."""
    request = GenerationRequest(
        "a", tuple(range(20)), SamplingParams(seed=1), StoppingParams(max_tokens=20), policy=CORE
    )
    wanted = finish_all(tiny_engine(), dense_of([request]))
    engine = tiny_engine()
    forward = engine.backend.forward

    def spoiled(batch):
        output = forward(batch)
        if batch.sequences[0].choice.is_dense:
            return output
        none = torch.full_like(output.candidates.log_normalizer, math.nan)
        return replace(output, candidates=replace(output.candidates, log_normalizer_1=none))

    monkeypatch.setattr(engine.backend, "forward", spoiled)
    assert_equal_results(finish_all(engine, [request]), wanted)
