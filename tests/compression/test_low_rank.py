"""Low-rank compensation, against SVDs with explicit square roots in NumPy, and by what it promises."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_kernels.formats import MatrixFormat
from sparserve.compression.gptq import gptq
from sparserve.compression.low_rank import (
    FACTOR_ZERO,
    Decomposition,
    LowRank,
    lorc,
    qera,
    quantize_factors,
)
from sparserve.compression.quantize import quantize
from sparserve.compression.statistics import InputMoments

SHAPES = [(40, 70), (70, 40), (50, 50)]
METHODS = ["lorc", "diagonal", "exact"]


def random_error(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.01


@pytest.fixture(scope="session")
def decompose(moments_of, diagonal_of):
    """(method, error, inputs, most) -> Decomposition"""

    def make(method: str, error: torch.Tensor, inputs: torch.Tensor, most: int) -> Decomposition:
        if method == "lorc":
            return lorc(error, most)
        return qera(error, (moments_of if method == "exact" else diagonal_of)(inputs), most)

    return make


def product(factors: LowRank) -> torch.Tensor:
    return factors.outputs.double() @ factors.inputs.double()


def left_over(error: torch.Tensor, factors: LowRank, inputs: torch.Tensor) -> float:
    """The mean of |(E - B A) x|^2."""
    rest = (error.double() - product(factors)) @ inputs.double().T
    return float(rest.square().sum(0).mean())


def plain(method: str, error: torch.Tensor, inputs: torch.Tensor) -> tuple[np.ndarray, ...]:
    """U, Sigma, V^T S^-1 as the papers have them."""
    x = inputs.double().numpy()
    second = x.T @ x / len(x)
    if method == "exact":
        values, vectors = np.linalg.eigh(second)
        root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    else:
        root = np.diag(np.sqrt(np.diag(second))) if method == "diagonal" else np.eye(x.shape[1])
    u, sigma, v = np.linalg.svd(error.double().numpy() @ root, full_matrices=False)
    return u, sigma, v @ np.linalg.inv(root)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_as_the_papers_have_it(method, shape, inputs_like, decompose):
    error, inputs = random_error(*shape), inputs_like(300, shape[1])
    u, sigma, v = plain(method, error, inputs)
    found = decompose(method, error, inputs, 30)
    assert found.singular_values.dtype == torch.float64
    np.testing.assert_allclose(found.singular_values, sigma[:30], rtol=1e-7)
    for rank in (1, 8, 30):
        factors = found.factors(rank)
        assert factors.outputs.dtype == factors.inputs.dtype == torch.float32
        expected_b = u[:, :rank] * np.sqrt(sigma[:rank])
        expected_a = np.sqrt(sigma[:rank])[:, None] * v[:rank]
        # A singular vector's sign is free.
        np.testing.assert_allclose(factors.outputs.abs(), np.abs(expected_b), rtol=1e-3, atol=1e-6)
        limit = 1e-5 * np.abs(expected_a).max()
        np.testing.assert_allclose(factors.inputs.abs(), np.abs(expected_a), rtol=1e-3, atol=limit)
        expected = expected_b @ expected_a
        limit = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(product(factors), expected, rtol=1e-3, atol=limit)


@settings(deadline=None, max_examples=40)
@given(
    out=st.integers(1, 60),
    width=st.integers(1, 60),
    tokens=st.integers(1, 100),
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
)
def test_exact_is_never_worse_and_more_ranks_neither(
    out, width, tokens, seed, scale, inputs_like, decompose
):
    inputs = inputs_like(tokens, width, seed) * scale
    error, most = random_error(out, width, seed=seed), min(out, width)
    whole = left_over(error, LowRank(torch.zeros(out, 0), torch.zeros(0, width)), inputs)
    found = {method: decompose(method, error, inputs, most) for method in METHODS}
    ranks = sorted({0, 1, most // 2, most})
    errors = {
        method: [left_over(error, own.factors(rank), inputs) for rank in ranks]
        for method, own in found.items()
    }
    slack = 1e-9 * whole
    for exact, diagonal, plain_svd in zip(
        *(errors[m] for m in ("exact", "diagonal", "lorc")), strict=True
    ):
        assert exact <= diagonal + slack
        assert exact <= plain_svd + slack
    assert all(a >= b - slack for a, b in itertools.pairwise(errors["exact"]))
    # What each singular value promises.
    squares = found["exact"].singular_values.square()
    for rank, error_left in zip(ranks, errors["exact"], strict=True):
        assert error_left == pytest.approx(whole - float(squares[:rank].sum()), abs=1e-6 * whole)
    for own in found.values():
        factors = own.factors(most)
        assert factors.outputs.isfinite().all()
        assert factors.inputs.isfinite().all()


def test_the_diagonal_is_the_best_where_inputs_do_not_correlate(diagonal_of):
    squares = torch.rand(40, generator=torch.Generator().manual_seed(0)).double()
    error = random_error(60, 40)
    known, full = InputMoments(squares, 1), InputMoments(torch.diag(squares), 1)
    one, other = qera(error, known, 8), qera(error, full, 8)
    torch.testing.assert_close(product(one.factors(8)), product(other.factors(8)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_all_ranks_give_the_error_back(method, shape, decompose):
    """Where inputs reach every direction."""
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(300, shape[1], generator=draw) * torch.rand(shape[1], generator=draw)
    error = random_error(*shape)
    factors = decompose(method, error, inputs, 1000).factors(min(shape))
    assert factors.outputs.shape == (shape[0], min(shape))
    torch.testing.assert_close(product(factors).float(), error, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_few_sources_of_inputs_need_few_ranks(shape, inputs_like, decompose):
    """R has rank 5."""
    error, inputs = random_error(*shape), inputs_like(300, shape[1], sources=5)
    found = decompose("exact", error, inputs, 40)
    nothing = left_over(error, found.factors(0), inputs)
    assert left_over(error, found.factors(5), inputs) < 1e-9 * nothing
    factors = found.factors(40)
    assert left_over(error, factors, inputs) < 1e-9 * nothing
    # What inputs never showed is not made worse.
    assert (error - product(factors)).norm() <= error.norm()
    assert not factors.outputs[:, 5:].any()
    assert not factors.inputs[5:].any()


@pytest.mark.parametrize("method", ["diagonal", "exact"])
def test_inputs_that_were_always_0_do_no_harm(method, inputs_like, decompose):
    inputs = inputs_like(200, 60)
    inputs[:, 7:20] = 0
    for shape in ((80, 60), (30, 60)):
        error = random_error(*shape)
        factors = decompose(method, error, inputs, 8).factors(8)
        dead = error[:, 7:20] - product(factors)[:, 7:20]
        assert dead.norm() <= error[:, 7:20].norm()


@pytest.mark.parametrize("method", METHODS)
def test_no_error_needs_no_factors(method, inputs_like, decompose):
    found = decompose(method, torch.zeros(30, 50), inputs_like(90, 50), 8)
    assert not found.singular_values.any()
    assert not found.outputs.any()
    assert not found.inputs.any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_twice(method, shape, inputs_like, decompose):
    error, inputs = random_error(*shape), inputs_like(100, shape[1])
    one, again = (decompose(method, error, inputs, 16) for _ in range(2))
    for name in ("singular_values", "outputs", "inputs"):
        assert torch.equal(getattr(one, name), getattr(again, name))


def test_a_transposed_product():
    factors = lorc(random_error(30, 50), 4).factors(4)
    turned = factors.transposed
    assert turned.outputs.shape == (50, 4)
    assert torch.equal(product(turned), product(factors).T)


def test_what_cannot_be_decomposed_is_refused(inputs_like, moments_of):
    moments = moments_of(inputs_like(10, 20))
    with pytest.raises(
        ValueError, match="moments of 20 inputs and 10 tokens for an error of 30 inp"
    ):
        qera(random_error(5, 30), moments, 4)
    with pytest.raises(ValueError, match="of 30 inputs and 0 tokens"):
        qera(random_error(5, 30), InputMoments.full(30), 4)
    found = lorc(random_error(5, 30), 4)
    for rank in (-1, 5):
        with pytest.raises(ValueError, match=f"rank is {rank}; .* 0 to 4"):
            found.factors(rank)


class TestQuantizedFactors:
    @settings(deadline=None, max_examples=60)
    @given(
        out=st.integers(1, 20),
        rank=st.integers(0, 20),
        seed=st.integers(0, 999),
        spread=st.sampled_from([0.0, 1.0, 3.0]),
        scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e12]),
    )
    def test_each_number_is_half_a_scale_off_at_most(self, out, rank, seed, spread, scale):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        outputs = normal(out, rank) * (spread * normal(out, 1)).exp() * scale
        factors = LowRank(outputs, normal(rank, 7))
        made = quantize_factors(factors)
        again = made.dequantize()
        assert (made.codes.dtype, made.codes.shape) == (torch.uint8, (out, rank))
        assert (made.scales.dtype, made.scales.shape) == (torch.float16, (out,))
        assert made.inputs.dtype == torch.bfloat16
        if not rank:
            return
        values = made.scales.double()[:, None] * (made.codes.double() - FACTOR_ZERO)
        assert torch.equal(again.outputs.double(), values)
        # One power of two went from B to A.
        largest = outputs.abs().max()
        near = again.outputs.abs().max() / largest
        shift = 2.0 ** round(math.log2(float(near)))
        exact = outputs.double() * shift
        assert ((values - exact).abs() <= made.scales.double()[:, None] * 0.5000001).all()
        moved = factors.inputs.double() / shift
        assert ((again.inputs - moved).abs() <= moved.abs() / 256).all()
        assert 0.4 < float(made.scales.max()) < 2
        # No scale is much larger than a row needs.
        need = torch.maximum(exact.amax(1) / 119, -exact.amin(1) / 136)
        assert (made.scales.double() <= need * (1 + 2**-10) + 2**-24).all()

    def test_both_ends_of_the_codes_are_used(self):
        outputs = torch.tensor([[119.0, 1.0, -136.0], [-136.0, 0.0, 5.0], [119.0, -119.0, 0.0]])
        made = quantize_factors(LowRank(outputs, torch.ones(3, 4)))
        assert made.codes.tolist() == [[255, 137, 0], [0, 136, 141], [255, 17, 136]]
        assert made.scales.tolist() == [1, 1, 1]

    def test_a_row_of_zeros(self):
        outputs = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
        made = quantize_factors(LowRank(outputs, torch.ones(2, 4)))
        assert made.scales[0] == 0
        assert made.codes[0].tolist() == [136, 136]
        assert not quantize_factors(LowRank(torch.zeros(3, 2), torch.zeros(2, 4))).scales.any()

    @pytest.mark.parametrize("shape", [(320, 128), (128, 320)])
    @pytest.mark.parametrize("base", ["nearest", "gptq"])
    @pytest.mark.parametrize("method", METHODS)
    def test_rounding_costs_less_than_a_hundredth_of_the_gain(
        self, method, base, shape, inputs_like, decompose, moments_of
    ):
        """As stored for down too: of the transpose."""
        inputs, format = inputs_like(800, shape[1]), MatrixFormat(4, 64)
        weight = random_error(*shape).bfloat16()
        made = (
            gptq(weight, moments_of(inputs), format, "w")
            if base == "gptq"
            else quantize(weight, format, "w")
        )
        error = weight.float() - made.dequantize()
        factors = decompose(method, error, inputs, 32).factors(32)
        before = left_over(error, LowRank(factors.outputs[:, :0], factors.inputs[:0]), inputs)
        exact = left_over(error, factors, inputs)
        assert exact < 0.9 * before
        for rounded in (
            quantize_factors(factors).dequantize(),
            quantize_factors(factors.transposed).dequantize().transposed,
        ):
            assert left_over(error, rounded, inputs) - exact < 0.01 * (before - exact)
