"""The sampler against the plain definition of temperature and truncations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserve.engine.request import SamplingParams
from sparserve.engine.sampler import (
    Row,
    _truncate_whole,
    adjusted_row,
    candidates_for,
    generated_token,
    rows_of,
    sample,
)
from sparserve.model.candidates import top_candidates


def row_of(logits: torch.Tensor, temperature: float = 1.0) -> Row:
    candidates = top_candidates(logits[None].float(), torch.tensor([temperature]))
    return rows_of(candidates, logits.shape[0])[0]


def plain_distribution(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """softmax(logits / T), cut to the top_k likeliest, then to the fewest holding top_p, then to those
    within min_p of the likeliest, then to the typical ones (arXiv 2202.00666, equation 11)."""
    order = np.lexsort((np.arange(len(logits)), -logits.double().numpy()))
    p = torch.softmax(logits.double() / params.temperature, 0).numpy()[order]
    if params.top_k:
        p[params.top_k :] = 0
    p /= p.sum()
    if params.top_p < 1:
        p[np.searchsorted(np.cumsum(p), params.top_p) + 1 :] = 0
    p[p < params.min_p * p.max()] = 0
    p /= p.sum()
    if params.typical_p < 1:
        information = np.array([-np.log(x) if x > 0 else np.inf for x in p])
        entropy = sum(x * i for x, i in zip(p, information, strict=True) if x > 0)
        kept, mass = set(), 0.0
        for index in np.argsort(np.abs(information - entropy), kind="stable"):
            kept.add(index)
            mass += p[index]
            if mass >= params.typical_p:
                break
        p[[index for index in range(len(p)) if index not in kept]] = 0
    p /= p.sum()
    out = np.zeros(len(p))
    out[order] = p
    return out


CASES = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=2.0),
    SamplingParams(temperature=0.8, top_k=5),
    SamplingParams(temperature=1.0, top_p=0.5),
    SamplingParams(temperature=1.5, top_k=7, top_p=0.7),
    SamplingParams(temperature=1.0, min_p=0.05),
    SamplingParams(temperature=1.0, typical_p=0.6),
    SamplingParams(temperature=1.0, top_k=40, typical_p=0.3),
    SamplingParams(temperature=1.0, top_k=100, top_p=0.95, min_p=0.01, typical_p=0.8),
    # beyond the candidates
    SamplingParams(temperature=2.0, top_k=400),
    SamplingParams(temperature=2.0, top_p=0.97),
    SamplingParams(temperature=2.0, top_k=500, top_p=0.9),
    SamplingParams(temperature=2.0, min_p=0.02),
    SamplingParams(temperature=2.0, typical_p=0.9),
    SamplingParams(temperature=2.0, top_k=700, top_p=0.99, min_p=0.001, typical_p=0.95),
]


@pytest.mark.parametrize("params", CASES, ids=str)
def test_draws_follow_the_plain_definition(params: SamplingParams) -> None:
    torch.manual_seed(11)
    # Flat enough that much of the mass lies outside of the 256 candidates.
    logits = torch.randn(1000) * (4 if params.temperature < 1.5 else 1)
    row, expected = row_of(logits, params.temperature), plain_distribution(logits, params)
    draws = 6000
    counts = np.bincount(
        [sample(row, params, seed=3, choice=0, step=i) for i in range(draws)], minlength=1000
    )
    assert counts[expected == 0].sum() == 0, "a token outside of the kept set was drawn"
    # Total variation of an exact sampler over n draws stays near sqrt(kept / (2 pi n)).
    kept = int((expected > 0).sum())
    assert (
        np.abs(counts / draws - expected).sum() / 2
        < 1.5 * np.sqrt(kept / (2 * np.pi * draws)) + 0.01
    )


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    temperature=st.just(0.0) | st.floats(0.05, 2.0),
    top_k=st.integers(1, 256),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    typical_p=st.floats(0.01, 1.0),
    scale=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
)
def test_as_few_candidates_as_are_needed_give_the_token_of_the_whole_row(
    seed, temperature, top_k, top_p, min_p, typical_p, scale
):
    logits = scale * torch.randn(1000, generator=torch.Generator().manual_seed(seed))
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p
    )
    needed = candidates_for(params, 1000)
    assert needed == (top_k if temperature else 1)
    whole = top_candidates(logits[None], torch.tensor([params.softmax_temperature]))
    nothing = torch.tensor([torch.nan])
    head = replace(whole, log_normalizer=nothing, log_normalizer_1=nothing, known=[needed])
    (row,) = rows_of(head, 1000)
    assert len(row.ids) == len(row.logits) == needed
    assert sample(row, params, seed, 0, 7) == sample(rows_of(whole, 1000)[0], params, seed, 0, 7)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(top_p=0.5),
        SamplingParams(min_p=0.5),
        SamplingParams(typical_p=0.5),
        SamplingParams(top_k=257),
        SamplingParams(top_k=1000),
    ],
    ids=str,
)
def test_what_needs_the_whole_row(params):
    assert candidates_for(params, 1000) == 0
    assert candidates_for(SamplingParams(top_k=49), 50) == 49
    assert candidates_for(SamplingParams(top_k=50), 50) == 0


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 1000),
    step=st.integers(0, 100_000),
    temperature=st.floats(0.05, 2.0),
    top_k=st.one_of(st.just(0), st.integers(1, 1200)),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0) | st.floats(0.0, 0.01),
    typical_p=st.floats(0.01, 1.0) | st.just(1.0),
    scale=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
)
def test_only_tokens_of_the_plain_definition_are_drawn_the_same_every_time(
    seed, choice, step, temperature, top_k, top_p, min_p, typical_p, scale
):
    logits = scale * torch.randn(1000, generator=torch.Generator().manual_seed(step))
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p
    )
    row = row_of(logits, temperature)
    token_id = sample(row, params, seed, choice, step)
    assert token_id == sample(row, params, seed, choice, step)
    if scale:  # of equal tokens any may be kept
        # Float32 candidates may differ from the plain definition in the last token kept.
        slack = [
            replace(
                params,
                top_p=min(1, top_p * f),
                min_p=min(1, min_p / f),
                typical_p=min(1, typical_p * f),
            )
            for f in (0.999999, 1.0, 1.000001)
        ]
        assert any(plain_distribution(logits, p)[token_id] > 0 for p in slack)


@pytest.mark.parametrize("flat", [0.0, 1e-6, 1.0])
def test_a_large_vocabulary_is_cut_as_by_sorting_it(flat):
    logits = flat * torch.randn(60_000, generator=torch.Generator().manual_seed(5))
    params = SamplingParams(temperature=2.0, top_p=0.9, typical_p=0.9)
    weights = _truncate_whole(torch.softmax(logits.double() / 2, 0).numpy(), 60_000, params)
    expected = plain_distribution(logits, params)
    assert abs(int((weights > 0).sum()) - int((expected > 0).sum())) <= 1
    if flat == 1.0:
        assert ((weights > 0) != (expected > 0)).sum() <= 2


def test_greedy_takes_the_first_of_equal_maxima() -> None:
    logits = torch.zeros(600)
    logits[[17, 400, 3]] = 5.0
    assert sample(row_of(logits), SamplingParams(temperature=0), 0, 0, 0) == 3


def test_seed_choice_and_step_each_give_other_tokens() -> None:
    row = row_of(torch.zeros(600))
    draws = [{sample(row, SamplingParams(), *where) for where in positions} for positions in (
        [(1, 0, i) for i in range(50)], [(1, i, 0) for i in range(50)], [(i, 0, 0) for i in range(50)],
    )]  # fmt: skip
    assert all(len(drawn) > 30 for drawn in draws)


def test_a_vocabulary_smaller_than_the_candidates_is_complete() -> None:
    row = row_of(torch.tensor([0.0, 1.0, -1.0]), 2.0)
    drawn = {sample(row, SamplingParams(temperature=2.0), 5, 0, step=i) for i in range(100)}
    assert drawn == {0, 1, 2}


@pytest.mark.parametrize("token_id", [0, 17, 999])
def test_log_probabilities_are_those_of_the_whole_row(token_id):
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(7)) * 3
    expected = torch.log_softmax(logits.double(), 0)
    token = generated_token(row_of(logits), token_id, num_top=5)
    assert token.logprob == pytest.approx(float(expected[token_id]), abs=1e-5)
    top = expected.topk(5)
    assert [t.id for t in token.top] == top.indices.tolist()
    assert [t.logprob for t in token.top] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_a_row_without_a_possible_token_is_an_error():
    with pytest.raises(FloatingPointError):
        sample(adjusted_row(np.full(300, -np.inf, np.float32), 1.0), SamplingParams(), 0, 0, 0)


def test_forbidden_tokens_never_come_even_from_the_whole_row():
    logits = np.zeros(1000, np.float32)
    logits[::2] = -np.inf
    row = adjusted_row(logits, 1.0)
    cases = [
        SamplingParams(),
        SamplingParams(top_p=0.999),
        SamplingParams(top_k=900),
        SamplingParams(typical_p=0.99),
    ]
    for params in cases:
        drawn = {sample(row, params, 1, 0, i) for i in range(300)}
        assert all(i % 2 for i in drawn)
        assert len(drawn) > 150
