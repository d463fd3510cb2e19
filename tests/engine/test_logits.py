"""Penalties, bias, minimum length and allowed tokens against their plain definitions."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserve.engine.logits import LogitAdjuster, refused_tokens
from sparserve.engine.request import GenerationRequest, SamplingParams, StoppingParams

VOCAB = 40
tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


def adjuster(prompt, output, sampling, stopping=StoppingParams()) -> LogitAdjuster:
    request = GenerationRequest("a", tuple(prompt), sampling, stopping)
    refused = refused_tokens(request, VOCAB)
    made = LogitAdjuster(request, VOCAB, (3, 5), refused)
    for token_id in output:
        made.accept(token_id)
    return made


def random_logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(
    prompt=tokens,
    output=tokens,
    seed=st.integers(0, 1000),
    repetition=st.floats(0.01, 10),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=5),
    allowed=st.sets(st.integers(0, VOCAB - 1), max_size=10),
    min_tokens=st.integers(0, 14),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sets(st.integers(0, VOCAB - 1), max_size=3),
)
def test_adjusted_logits_are_those_of_the_definition(
    prompt, output, seed, repetition, presence, frequency, bias, allowed, min_tokens, ignore_eos, stop_token_ids
):  # fmt: skip
    sampling = SamplingParams(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=tuple(bias.items()),
        allowed_token_ids=tuple(allowed),
    )
    stopping = StoppingParams(
        max_tokens=99,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        stop_token_ids=tuple(stop_token_ids),
    )
    logits = random_logits(seed)
    before = logits.copy()
    expected = []
    for token_id, logit in enumerate(logits.astype(np.float64)):
        if token_id in prompt or token_id in output:
            logit = logit / repetition if logit > 0 else logit * repetition
        logit -= frequency * output.count(token_id) + presence * (token_id in output)
        logit += bias.get(token_id, 0)
        ends = token_id in stop_token_ids or (token_id in (3, 5) and not ignore_eos)
        if ends and len(output) < min_tokens:
            logit = -np.inf
        if allowed and token_id not in allowed:
            logit = -np.inf
        expected.append(logit)
    made = adjuster(prompt, output, sampling, stopping)
    np.testing.assert_allclose(made.adjust(logits), expected, rtol=1e-5, atol=1e-4)
    assert np.array_equal(logits, before)
    assert made.may_end == (len(output) >= min_tokens)


class Alternating:
    """A constraint: even tokens, then odd ones; finished after four."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def matcher(self) -> "Alternating":
        return self

    def fork(self) -> "Alternating":
        other = Alternating()
        other.taken = list(self.taken)
        return other

    def allowed(self) -> np.ndarray:
        bits = np.zeros(64, np.uint8)
        bits[len(self.taken) % 2 : VOCAB : 2] = 1
        bits[VOCAB:] = 1  # beyond the vocabulary: no matter
        return np.packbits(bits, bitorder="little").view(np.int32)

    @property
    def is_finished(self) -> bool:
        return len(self.taken) == 4

    def accept(self, token_id: int) -> None:
        self.taken.append(token_id)


def test_a_fork_goes_on_by_itself():
    sampling = SamplingParams(repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.5)
    constraint = SimpleNamespace(matcher=Alternating)
    stopping = StoppingParams(min_tokens=2)
    request = GenerationRequest("a", (1, 2), sampling, stopping, constraint=constraint)
    made, same = (LogitAdjuster(request, VOCAB, (0,)) for _ in range(2))
    logits = random_logits(1)
    for adjuster in (made, same):
        adjuster.accept(4)
    fork = made.fork()
    fork.accept(5)
    assert made.adjust(logits).tolist() == same.adjust(logits).tolist()
    same.accept(5)
    assert fork.adjust(logits).tolist() == same.adjust(logits).tolist()
    assert (fork.may_end, made.may_end) == (True, False)


def test_a_constraint_forbids_all_other_tokens_and_is_fed_the_output():
    constraint = Alternating()
    request = GenerationRequest("a", (1,), constraint=constraint)
    made = LogitAdjuster(request, VOCAB, ())
    logits = random_logits(1)
    for step in range(4):
        assert not made.is_finished
        assert not made.is_idle
        possible = np.flatnonzero(np.isfinite(made.adjust(logits)))
        assert possible.tolist() == list(range(step % 2, VOCAB, 2))
        made.accept(int(possible[step]))
    assert made.is_finished
    assert constraint.taken == [0, 3, 4, 7]


def test_a_constraint_goes_on_past_an_ignored_eos():
    request = GenerationRequest(
        "a", (1,), stopping=StoppingParams(ignore_eos=True), constraint=Alternating()
    )
    made = LogitAdjuster(request, VOCAB, eos_token_ids=(2, 3))
    possible = np.flatnonzero(np.isfinite(made.adjust(random_logits(1))))
    assert possible.tolist() == [i for i in range(0, VOCAB, 2) if i != 2]


@pytest.mark.parametrize(
    ("sampling", "stopping", "idle"),
    [
        (SamplingParams(), StoppingParams(), True),
        (SamplingParams(temperature=0.5, top_p=0.3), StoppingParams(stop=("x",)), True),
        (SamplingParams(presence_penalty=0.1), StoppingParams(), False),
        (SamplingParams(repetition_penalty=1.1), StoppingParams(), False),
        (SamplingParams(logit_bias=((1, 1.0),)), StoppingParams(), False),
        (SamplingParams(allowed_token_ids=(1,)), StoppingParams(), False),
        (SamplingParams(), StoppingParams(min_tokens=5), False),
        (SamplingParams(), StoppingParams(min_tokens=2), True),
        (SamplingParams(), StoppingParams(min_tokens=5, ignore_eos=True), True),
    ],
)
def test_a_request_that_changes_nothing_leaves_the_candidates_as_they_are(sampling, stopping, idle):
    assert adjuster([1], [2, 4], sampling, stopping).is_idle is idle
