"""Column scales: what they are good for, and that what takes them back computes the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_kernels.formats import MatrixFormat
from sparserve.compression.quantize import quantize
from sparserve.compression.scaling import GREATEST, column_scales

FORMAT = MatrixFormat(4, 64)


def error(weight: torch.Tensor, squares: torch.Tensor, scales: torch.Tensor) -> float:
    """Of the products, for inputs that do not correlate."""
    values = quantize(weight * scales, FORMAT, "w").dequantize() / scales
    return float(((values - weight).double().square() @ squares.double()).sum())


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25)
@given(st.integers(0, 1 << 30), st.integers(1, 40), st.sampled_from([32, 64, 96, 200]))
def test_no_worse_than_without(seed, rows, columns):
    weight = random(rows, columns, seed=seed) * random(columns, seed=seed + 1).exp()
    squares = random(columns, seed=seed + 2).exp()
    scales = column_scales(weight, squares, FORMAT, "w")
    assert scales.shape == (columns,)
    assert bool(((scales >= 1 / GREATEST) & (scales <= GREATEST)).all())
    assert error(weight, squares, scales) <= error(weight, squares, torch.ones(columns)) * 1.0001


def test_columns_of_other_sizes_cost_nothing():
    """A function with sizes moved between a matrix and its inputs is rounded nearly as well as it was."""
    weight, sizes = random(64, 128, seed=1), torch.exp2(random(128, seed=2))
    even = error(weight, torch.ones(128), torch.ones(128))
    moved, squares = weight * sizes, sizes**-2
    assert error(moved, squares, torch.ones(128)) > 2 * even
    assert error(moved, squares, column_scales(moved, squares, FORMAT, "w")) < 1.1 * even


def test_what_matters_is_rounded_finely():
    weight, squares = random(64, 128, seed=1), torch.ones(128)
    squares[7] = 1000.0
    scales = column_scales(weight, squares, FORMAT, "w")
    assert scales[7] > 2 * scales.median()
    assert error(weight, squares, scales) < 0.7 * error(weight, squares, torch.ones(128))


def test_columns_that_are_alike_share_a_scale():
    weight, squares = random(16, 2 * 3 * 32, seed=3), random(2 * 3 * 32, seed=4).exp()
    scales = column_scales(weight, squares, FORMAT, "w", (2, 3, 32)).view(2, 3, 32)
    assert torch.equal(scales, scales[:, :1].expand(2, 3, 32))
    assert scales.unique().numel() > 2


@pytest.mark.parametrize("dead", ["inputs", "columns", "both"])
def test_zeros_are_no_obstacle(dead):
    weight, squares = random(8, 64, seed=5), torch.ones(64)
    if dead != "columns":
        squares[:40] = 0
    if dead != "inputs":
        weight[:, 20:60] = 0
    scales = column_scales(weight, squares, FORMAT, "w")
    assert bool(scales.isfinite().all())
    assert bool((scales > 0).all())


def test_many_rows_are_sampled_alike():
    weight, squares = random(5000, 64, seed=6), random(64, seed=7).exp()
    first = column_scales(weight, squares, FORMAT, "w")
    assert torch.equal(first, column_scales(weight.clone(), squares, FORMAT, "w"))


def test_moments_of_divided_inputs(inputs_like, moments_of, diagonal_of):
    inputs, scales = inputs_like(50, 16), random(16, seed=8).exp()
    for make in (moments_of, diagonal_of):
        divided, expected = make(inputs).divided(scales), make(inputs / scales)
        torch.testing.assert_close(divided.sums, expected.sums, rtol=1e-5, atol=1e-9)
        assert divided.tokens == 50
