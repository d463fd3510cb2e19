"""The head of each row of logits: order, ties, small vocabularies, normalizers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserve.model.backend import NUM_CANDIDATES
from sparserve.model.candidates import top_candidates


def defined_ids(row: torch.Tensor) -> list[int]:
    """(logit descending, id ascending)"""
    return sorted(range(len(row)), key=lambda i: (-float(row[i]), i))[:NUM_CANDIDATES]


def assert_defined(logits: torch.Tensor) -> None:
    candidates = top_candidates(logits, torch.ones(len(logits)))
    assert candidates.token_ids.dtype == torch.int64
    assert candidates.logits.dtype == torch.float32
    for row, ids, values in zip(logits, candidates.token_ids, candidates.logits, strict=True):
        assert ids.tolist() == defined_ids(row)
        assert torch.equal(values, row[ids])


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 258, 5000])
def test_candidates_are_the_256_likeliest_in_order(vocab):
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)) * 5
    assert_defined(logits)
    assert top_candidates(logits, torch.ones(3)).token_ids.shape == (3, min(vocab, 256))


def test_ties_go_to_the_lower_id_even_at_the_last_candidate():
    generator = torch.Generator().manual_seed(0)
    assert_defined(torch.randint(-3, 3, (4, 2000), generator=generator).float())
    assert_defined(torch.randn(4, 49152, generator=generator).bfloat16().float())
    assert_defined(torch.zeros(2, 1000))
    one_above = torch.zeros(1, 1000)
    one_above[0, 999] = 1
    assert_defined(one_above)


def test_zeros_of_both_signs_are_equal():
    logits = torch.zeros(1, 600)
    logits[0, ::2] = -0.0
    assert_defined(logits)


def test_tokens_ruled_out_with_minus_infinity_come_last():
    logits = torch.full((1, 300), float("-inf"))
    logits[0, [7, 250]] = torch.tensor([1.0, 2.0])
    assert_defined(logits)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_order_holds_for_any_pattern_of_ties(data):
    vocab = data.draw(st.integers(1, 700))
    levels = data.draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    assert_defined(torch.randint(0, levels, (2, vocab), generator=generator).float())


def test_a_row_that_is_not_a_number_leaves_the_others_alone():
    logits = torch.randn(3, 400, generator=torch.Generator().manual_seed(1))
    broken = logits.clone()
    broken[1, :] = float("nan")
    broken[2, 5] = float("nan")
    assert torch.equal(
        top_candidates(broken, torch.ones(3)).token_ids[0],
        top_candidates(logits, torch.ones(3)).token_ids[0],
    )


@pytest.mark.parametrize("temperature", [1e-6, 0.01, 0.5, 1.0, 2.0, 100.0])
def test_log_normalizers_are_of_the_whole_row_below_its_top_at_the_temperature_and_at_1(
    temperature,
):
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(2)) * 10
    logits[3] = 1e4  # exp would overflow
    temperatures = torch.tensor([temperature, 1.0, temperature, temperature])
    candidates = top_candidates(logits, temperatures)
    below_top = logits.double() - logits.double().max(dim=1, keepdim=True).values
    expected = (below_top / temperatures.double()[:, None]).logsumexp(1)
    torch.testing.assert_close(candidates.log_normalizer.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        candidates.log_normalizer_1.double(), below_top.logsumexp(1), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_among_others_has_the_bits_of_the_row_alone(threads):
    """A sum of more than 32768 values is shared between threads where it is the only one."""
    torch.set_num_threads(threads)
    logits = torch.randn(3, 49152, generator=torch.Generator().manual_seed(3)) * 5
    temperatures = torch.tensor([0.7, 1.3, 0.2])
    together = top_candidates(logits, temperatures)
    for row in range(3):
        alone = top_candidates(logits[row : row + 1], temperatures[row : row + 1])
        assert torch.equal(alone.token_ids[0], together.token_ids[row])
        assert torch.equal(alone.log_normalizer[0], together.log_normalizer[row])
        assert torch.equal(alone.log_normalizer_1[0], together.log_normalizer_1[row])


def test_full_logits_are_the_rows_themselves():
    logits = torch.randn(3, 500)
    candidates = top_candidates(logits, torch.ones(3))
    for row in range(3):
        assert torch.equal(candidates.full_logits(row), logits[row])


def test_no_rows_are_no_candidates():
    candidates = top_candidates(torch.zeros(0, 500), torch.ones(0))
    assert candidates.token_ids.shape == (0, 256)
    assert candidates.log_normalizer.shape == (0,)
