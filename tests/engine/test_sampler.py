"""The sampler against the plain definition of temperature, top_k and top_p."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserve.engine.request import SamplingParams
from sparserve.engine.sampler import Row, rows_of, sample
from sparserve.model.reference import top_candidates


def row_of(logits: torch.Tensor, temperature: float = 1.0) -> Row:
    candidates = top_candidates(logits[None].float(), torch.tensor([temperature]))
    return rows_of(candidates, logits.shape[0])[0]


def plain_distribution(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """softmax(logits / T), cut to the top_k likeliest, then to the fewest holding top_p."""
    order = np.lexsort((np.arange(len(logits)), -logits.double().numpy()))
    p = torch.softmax(logits.double() / params.temperature, 0).numpy()[order]
    if params.top_k:
        p[params.top_k :] = 0
    p /= p.sum()
    keep = np.searchsorted(np.cumsum(p), params.top_p) + 1
    p[keep:] = 0
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
    SamplingParams(temperature=2.0, top_k=400),  # beyond the candidates
    SamplingParams(temperature=2.0, top_p=0.97),  # beyond the candidates
    SamplingParams(temperature=2.0, top_k=500, top_p=0.9),
]


@pytest.mark.parametrize("params", CASES, ids=str)
def test_draws_follow_the_plain_definition(params: SamplingParams) -> None:
    torch.manual_seed(11)
    # Flat enough that much of the mass lies outside of the 256 candidates.
    logits = torch.randn(1000) * (4 if params.temperature < 1.5 else 1)
    row, expected = row_of(logits, params.temperature), plain_distribution(logits, params)
    draws = 6000
    counts = np.bincount(
        [sample(row, params, seed=3, step=i).id for i in range(draws)], minlength=1000
    )
    assert counts[expected == 0].sum() == 0, "a token outside of the kept set was drawn"
    # Total variation of an exact sampler over n draws stays near sqrt(kept / (2 pi n)).
    kept = int((expected > 0).sum())
    assert (
        np.abs(counts / draws - expected).sum() / 2
        < 1.5 * np.sqrt(kept / (2 * np.pi * draws)) + 0.01
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 100_000),
    temperature=st.floats(0.05, 2.0),
    top_k=st.one_of(st.just(0), st.integers(1, 1200)),
    top_p=st.floats(0.01, 1.0),
)
def test_looking_at_candidates_first_gives_the_token_of_the_whole_row(
    seed, step, temperature, top_k, top_p
):
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(step))
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    row = row_of(logits, temperature)
    token = sample(row, params, seed, step)
    assert token == sample(row, params, seed, step)
    assert plain_distribution(logits, params)[token.id] > 0
    assert token.logprob == pytest.approx(float(torch.log_softmax(logits, 0)[token.id]), abs=1e-5)


def test_greedy_takes_the_first_of_equal_maxima() -> None:
    logits = torch.zeros(600)
    logits[[17, 400, 3]] = 5.0
    assert sample(row_of(logits), SamplingParams(temperature=0), 0, 0).id == 3


def test_a_seed_gives_different_tokens_at_different_steps() -> None:
    row = row_of(torch.zeros(600))
    assert len({sample(row, SamplingParams(), seed=1, step=i).id for i in range(50)}) > 30


def test_a_vocabulary_smaller_than_the_candidates_is_complete() -> None:
    row = row_of(torch.tensor([0.0, 1.0, -1.0]), 2.0)
    drawn = {sample(row, SamplingParams(temperature=2.0), seed=5, step=i).id for i in range(100)}
    assert drawn == {0, 1, 2}
