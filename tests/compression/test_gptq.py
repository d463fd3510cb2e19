"""GPTQ, against the formulas of Optimal Brain Quantization that it comes from, in NumPy."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_kernels.formats import GROUP_SIZES, MatrixFormat
from sparse_kernels.weights import NonFiniteWeights, QuantizedMatrix
from sparserve.compression.gptq import SHRINKS, UnusableMoments, gptq, gptq_transposed
from sparserve.compression.quantize import ScaleOverflow, quantize
from sparserve.compression.statistics import InputMoments

INT4 = MatrixFormat(4, 64)
FORMATS = [MatrixFormat(bits, group) for bits in (4, 8) for group in GROUP_SIZES]
BOTH = pytest.mark.parametrize("solve", [gptq, gptq_transposed])


def random_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.05).bfloat16()


def output_error(made: torch.Tensor, weight: torch.Tensor, inputs: torch.Tensor) -> float:
    """Relative, of matrices [out, in]."""
    exact = weight.double()
    return float(((made - exact) @ inputs.T.double()).norm() / (exact @ inputs.T.double()).norm())


def assert_same(one: QuantizedMatrix, other: QuantizedMatrix) -> None:
    assert (one.bits, one.group_size) == (other.bits, other.group_size)
    for name in ("codes", "scales", "zeros"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def fitted(
    values: np.ndarray, top: int, squares: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """values [rows, columns of a group], squares [columns] -> scales, zeros [rows]: of the ranges tried the best."""
    counts = np.ones(values.shape[1]) if squares is None else squares
    found = []
    for shrink in SHRINKS.tolist():
        least, largest = (
            shrink * np.minimum(values.min(1), 0),
            shrink * np.maximum(values.max(1), 0),
        )
        scales = ((largest - least) / top).astype(np.float16)
        small = scales.astype(float) * top < largest - least
        scales = np.where(small, np.nextafter(scales, np.float16(np.inf)), scales).astype(float)
        steps = np.where(scales, scales, 1)[:, None]
        zeros = np.rint(-least / steps[:, 0])
        codes = (np.rint(values / steps) + zeros[:, None]).clip(0, top)
        made = scales[:, None] * (codes - zeros[:, None])
        found.append((((made - values) ** 2 * counts).sum(1), scales, zeros))
    errors, scales, zeros = (np.array(own) for own in zip(*found, strict=True))
    best = errors.argmin(0), np.arange(len(values))
    return scales[best], zeros[best]


Parameters = Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]]


def plain(
    weight: np.ndarray, sums: np.ndarray, order: list[int], parameters: Parameters, top: int
) -> np.ndarray:
    """weight [out, in] -> rounded; parameters(input, weight as it is now) -> its scales, zeros [out]."""
    inverse = np.linalg.inv(2 * sums + 0.01 * np.diag(2 * sums).mean() * np.eye(len(sums)))
    weight, made = weight.copy(), np.empty_like(weight)
    for column in order:
        scales, zeros = parameters(column, weight)
        codes = np.rint(weight[:, column] / np.where(scales, scales, 1)) + zeros
        made[:, column] = scales * (codes.clip(0, top) - zeros)
        # For what is left, inverse is that of its own part of H: taking an input out leaves its row 0.
        error = (weight[:, column] - made[:, column]) / inverse[column, column]
        weight -= np.outer(error, inverse[column])
        inverse -= np.outer(inverse[column], inverse[column]) / inverse[column, column]
    return made


def orders(sums: np.ndarray, act_order: bool) -> list[int]:
    by_size = sorted(range(len(sums)), key=lambda j: -sums[j, j])
    return by_size if act_order else list(range(len(sums)))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_groups_of_inputs_as_defined(format, act_order, inputs_like, moments_of):
    """170 inputs: more than a block, and not whole groups."""
    moments, weight = moments_of(inputs_like(400, 170)), random_weight(7, 170)
    original, size = weight.double().numpy(), format.group_size
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def parameters(column: int, now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        group = column // size
        part = slice(group * size, (group + 1) * size)
        if group not in found:
            known = (original if act_order else now)[:, part]
            found[group] = fitted(known, 2**format.bits - 1, moments.squares.numpy()[part])
        return found[group]

    sums = moments.sums.numpy()
    expected = plain(original, sums, orders(sums, act_order), parameters, 2**format.bits - 1)
    made = gptq(weight, moments, format, "w", act_order=act_order)
    assert (made.bits, made.group_size) == (format.bits, size)
    assert int(made.codes.max()) < 2**format.bits
    assert np.array_equal(made.dequantize().double().numpy(), expected)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_groups_of_outputs_as_defined(format, act_order, inputs_like, moments_of):
    moments, weight = moments_of(inputs_like(400, 140)), random_weight(140, 75)

    def parameters(column: int, now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size, values = format.group_size, now[:, column]
        parts = [values[None, begin : begin + size] for begin in range(0, len(values), size)]
        every = [fitted(part, 2**format.bits - 1) for part in parts]
        scales, zeros = (
            np.concatenate(
                [np.repeat(own[kind], part.size) for own, part in zip(every, parts, strict=True)]
            )
            for kind in (0, 1)
        )
        return scales, zeros

    sums, original = moments.sums.numpy(), weight.double().numpy().T
    expected = plain(original, sums, orders(sums, act_order), parameters, 2**format.bits - 1)
    made = gptq_transposed(weight, moments, format, "w", act_order=act_order)
    assert (made.bits, made.group_size) == (format.bits, format.group_size)
    assert np.array_equal(made.dequantize().double().numpy().T, expected)


@BOTH
@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 200),
    format=st.sampled_from(FORMATS),
    act_order=st.booleans(),
    value_bits=st.sampled_from([None, 2, 3, 4]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_inputs_that_do_not_correlate_are_rounded_no_worse_than_to_nearest(
    solve, rows, columns, format, act_order, value_bits, scale
):
    width = columns if solve is gptq else rows
    squares = torch.rand(width, generator=torch.Generator().manual_seed(rows)).double()
    moments = InputMoments(torch.diag(squares), tokens=10)
    weight = (random_weight(rows, columns, seed=columns) * scale).bfloat16()
    made = solve(weight, moments, format, "w", act_order=act_order, value_bits=value_bits)
    nearest = quantize(weight, format, "w", value_bits)
    assert int(made.codes.max()) < 2 ** (value_bits or format.bits)
    counts = squares if solve is gptq else squares[:, None]

    def off(matrix: QuantizedMatrix) -> float:
        error = matrix.dequantize().double() - weight.double()
        return float((error.square() * counts).sum())

    assert off(made) <= off(nearest) * (1 + 1e-9)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("value_bits", [3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_nearer_than_rounding_to_nearest(act_order, value_bits, seed, inputs_like, moments_of):
    """On what it was made for, and on more of the same."""
    inputs, weight = inputs_like(1500, 192, seed), random_weight(100, 192, seed=seed)
    known, fresh = inputs[:1000], inputs[1000:]
    moments, options = moments_of(known), {"act_order": act_order, "value_bits": value_bits}
    made = gptq(weight, moments, INT4, "w", **options).dequantize()
    across = gptq_transposed(weight.T, moments, INT4, "w", **options).dequantize().T
    nearest = quantize(weight, INT4, "w", value_bits).dequantize()
    nearest_across = quantize(weight.T, INT4, "w", value_bits).dequantize().T
    for x in (known, fresh):
        assert output_error(made, weight, x) < 0.8 * output_error(nearest, weight, x)
        assert output_error(across, weight, x) < 0.8 * output_error(nearest_across, weight, x)


@BOTH
@pytest.mark.parametrize("tokens", [1, 20, 96])
def test_fewer_tokens_than_inputs_are_enough_when_damped(solve, tokens, inputs_like, moments_of):
    inputs, weight = inputs_like(tokens, 96), random_weight(96, 96)
    made = solve(weight, moments_of(inputs), INT4, "w").dequantize()
    nearest = quantize(weight, INT4, "w").dequantize()
    if solve is gptq_transposed:
        weight, made, nearest = weight.T, made.T, nearest.T
    assert output_error(made, weight, inputs) < 0.6 * output_error(nearest, weight, inputs)


def test_inputs_that_were_always_0_keep_their_weights(inputs_like, moments_of):
    inputs, weight = inputs_like(300, 90), random_weight(90, 70)
    inputs[:, [3, 40, 89]] = 0
    made = gptq_transposed(weight, moments_of(inputs), INT4, "w").dequantize()
    nearest = quantize(weight, INT4, "w").dequantize()
    alone = [3, 40, 89]
    assert (made - weight)[alone].norm() <= (nearest - weight)[alone].norm() < 0.1
    assert not torch.equal(made, nearest)


@BOTH
def test_without_any_input_but_0_all_is_rounded_alone(solve, moments_of):
    weight = random_weight(64, 64)
    made = solve(weight, moments_of(torch.zeros(5, 64)), INT4, "w")
    nearest = quantize(weight, INT4, "w").dequantize()
    assert (made.dequantize() - weight).norm() <= (nearest - weight).norm()


@BOTH
def test_zeros_stay_zeros(solve, inputs_like, moments_of):
    weight = torch.zeros(70, 70).bfloat16()
    made = solve(weight, moments_of(inputs_like(100, 70)), INT4, "w")
    assert not made.codes.any()
    assert not made.scales.any()
    assert not made.zeros.any()


@pytest.mark.parametrize("act_order", [False, True])
def test_rows_of_a_stack_are_rounded_as_they_would_be_alone(act_order, inputs_like, moments_of):
    moments, gate, up = (
        moments_of(inputs_like(300, 100)),
        random_weight(20, 100),
        random_weight(30, 100),
    )
    stack = gptq(torch.cat((gate, up)), moments, INT4, "w", act_order=act_order)
    alone = [gptq(w, moments, INT4, "w", act_order=act_order) for w in (gate, up)]
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(stack, name), torch.cat([getattr(own, name) for own in alone]))


@BOTH
def test_the_same_twice_and_nothing_is_changed(solve, inputs_like, moments_of):
    moments, weight = moments_of(inputs_like(300, 150)), random_weight(150, 150)
    sums, kept = moments.sums.clone(), weight.clone()
    assert_same(solve(weight, moments, INT4, "w"), solve(weight, moments, INT4, "w"))
    assert torch.equal(moments.sums, sums)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("value_bits", [2, 3])
@BOTH
def test_codes_of_fewer_bits(solve, value_bits, inputs_like, moments_of):
    made = solve(
        random_weight(96, 96), moments_of(inputs_like(300, 96)), INT4, "w", value_bits=value_bits
    )
    assert made.bits == 4
    assert made.codes.max() == 2**value_bits - 1
    assert made.zeros.max() < 2**value_bits


class TestRefused:
    @BOTH
    def test_moments_of_something_else(self, solve, inputs_like, moments_of, diagonal_of):
        weight, inputs = random_weight(64, 64), inputs_like(10, 64)
        for moments, what in (
            (InputMoments.full(64), "full moments of 64 inputs and 0 tokens"),
            (diagonal_of(inputs), "diagonal moments of 64 inputs and 10 tokens"),
            (moments_of(inputs[:, :60]), "full moments of 60 inputs and 10 tokens"),
        ):
            with pytest.raises(UnusableMoments, match=f"^layer 2: v has {what}; GPTQ needs full"):
                solve(weight, moments, INT4, "layer 2: v")

    @BOTH
    def test_singular_moments(self, solve, inputs_like, moments_of):
        moments = moments_of(inputs_like(63, 64))
        with pytest.raises(
            UnusableMoments, match=r"of 63 tokens for the 64 inputs of v are singular.* 64 diff"
        ):
            solve(random_weight(64, 64), moments, INT4, "v", damping=0.0)

    @BOTH
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_weights_that_are_not_finite(self, solve, value, inputs_like, moments_of):
        weight = random_weight(64, 64)
        weight[5, 6] = value
        with pytest.raises(NonFiniteWeights, match=r"^layer 2: v holds"):
            solve(weight, moments_of(inputs_like(90, 64)), INT4, "layer 2: v")

    @BOTH
    @pytest.mark.parametrize("act_order", [False, True])
    def test_beyond_the_largest_scale(self, solve, act_order, inputs_like, moments_of):
        weight = random_weight(64, 64)
        weight[5, 6] = 2.0**20
        with pytest.raises(ScaleOverflow, match=r"^v has weights of .* to 1\.04858e\+06"):
            solve(weight, moments_of(inputs_like(90, 64)), INT4, "v", act_order=act_order)

    @BOTH
    @pytest.mark.parametrize("value_bits", [1, 5])
    def test_bits_that_codes_do_not_have(self, solve, value_bits, inputs_like, moments_of):
        with pytest.raises(
            ValueError, match=f"^value_bits is {value_bits}; in codes of int4 it can be 2 to 4"
        ):
            solve(
                random_weight(64, 64),
                moments_of(inputs_like(90, 64)),
                INT4,
                "v",
                value_bits=value_bits,
            )
