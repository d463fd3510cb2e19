"""Rounding to integers, against its definition in float64, a number at a time."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_kernels.formats import LayerFormats, MatrixFormat
from sparse_kernels.weights import LayerTensors, NonFiniteWeights
from sparserve.compression.quantize import ScaleOverflow, quantize, quantize_layer

FORMATS = [MatrixFormat(bits, group) for bits in (4, 8) for group in (32, 64, 128)]
SMALLEST, LARGEST = 2.0**-24, 65504.0  # of float16


def smallest_float16_not_below(value: float) -> float:
    with np.errstate(over="ignore"):
        near = np.float16(value)
    while float(near) < value:
        near = np.nextafter(near, np.float16(np.inf))
    while float(before := np.nextafter(near, np.float16(0))) >= value and near > 0:
        near = before
    return float(near)


def plain(values: list[float], bits: int) -> tuple[list[int], float, int]:
    """codes, scale, zero of one group."""
    largest_code = 2**bits - 1
    least, largest = min(0.0, *values), max(0.0, *values)
    scale = smallest_float16_not_below((largest - least) / largest_code)
    if scale == 0:
        return [0] * len(values), 0.0, 0
    zero = round(-least / scale)  # ties go to even numbers, in Python as in torch
    return [min(round(value / scale) + zero, largest_code) for value in values], scale, zero


def assert_as_defined(
    weight: torch.Tensor, format: MatrixFormat, value_bits: int | None = None
) -> None:
    quantized = quantize(weight, format, "w", value_bits)
    assert (quantized.bits, quantized.group_size) == (format.bits, format.group_size)
    for row, line in enumerate(weight.double().tolist()):
        for group, begin in enumerate(range(0, len(line), format.group_size)):
            part = slice(begin, begin + format.group_size)
            codes, scale, zero = plain(line[part], value_bits or format.bits)
            assert float(quantized.scales[row, group]) == scale
            assert int(quantized.zeros[row, group]) == zero
            assert quantized.codes[row, part].tolist() == codes
    groups = math.ceil(weight.shape[1] / format.group_size)
    assert quantized.scales.shape == quantized.zeros.shape == (len(weight), groups)


# Any bfloat16 below 2^18, subnormal ones too: a group from -2^19 to 2^19 needs too large a scale at 4 bits.
bfloat16_bits = st.integers(0, 0x487F) | st.integers(0x8000, 0xC87F)


@given(st.data(), st.sampled_from(FORMATS))
def test_any_weights_as_defined(data, format):
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 150))
    # A few distinct values, for long lists of free ones are slow to draw.
    pool = data.draw(st.lists(bfloat16_bits, min_size=1, max_size=20))
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    bits = draw.choice(np.array(pool, np.uint16), (rows, columns))
    assert_as_defined(torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), format)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("magnitude", [1e-7, 1e-4, 0.02, 30.0])
def test_random_weights_as_defined_and_no_further_off_than_half_a_scale(format, magnitude):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(9, 200, generator=generator) * magnitude).bfloat16()
    weight[2, 64:128] = 0
    assert_as_defined(weight, format)
    quantized = quantize(weight, format, "w")
    scales = quantized.scales.double().repeat_interleave(format.group_size, 1)[:, :200]
    error = (quantized.dequantize().double() - weight.double()).abs()
    assert (error <= scales * 0.5000001).all()
    assert not quantized.dequantize()[weight == 0].any()


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("value_bits", [2, 3, 4])
def test_codes_of_fewer_bits_as_defined(format, value_bits):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 150, generator=generator).bfloat16()
    assert_as_defined(weight, format, value_bits)
    assert quantize(weight, format, "w", value_bits).codes.max() == 2**value_bits - 1


@pytest.mark.parametrize("format", FORMATS[::3], ids=str)
@pytest.mark.parametrize("value", [1.0, -1.0, 2.0**-120, -(2.0**-133), 3e5, SMALLEST])
def test_constant_groups_keep_their_value(format, value):
    weight = torch.full((2, 100), value).bfloat16()
    assert_as_defined(weight, format)
    exact = weight.double()
    # A scale is at most 2^-10 larger than its quotient, or float16's smallest.
    error = (quantize(weight, format, "w").dequantize() - exact).abs().max()
    assert error <= max(abs(value) / 1024, SMALLEST / 2)


def test_zeros_have_scale_zero():
    quantized = quantize(torch.zeros(2, 100).bfloat16(), FORMATS[0], "w")
    assert not quantized.scales.any()
    assert not quantized.zeros.any()
    assert not quantized.codes.any()


def test_dequantizing_is_exact():
    """Of all scales and codes, without a rounding."""
    bits = np.random.default_rng(0).integers(0, 0x7C00, 500, dtype=np.int16)
    scales = torch.from_numpy(bits).view(torch.float16).view(-1, 1)
    weight = torch.zeros(500, 32).bfloat16()
    draw = torch.Generator().manual_seed(0)
    quantized = replace(
        quantize(weight, FORMATS[3], "w"),
        scales=scales,
        zeros=torch.randint(0, 256, (500, 1), generator=draw, dtype=torch.uint8),
        codes=torch.randint(0, 256, (500, 32), generator=draw, dtype=torch.uint8),
    )
    exact = scales.double() * (quantized.codes.double() - quantized.zeros.double())
    assert torch.equal(quantized.dequantize().double(), exact)


def test_strides_and_the_size_of_a_block_do_not_matter(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(70, 90, generator=generator).bfloat16()
    whole = quantize(weight, FORMATS[1], "w")
    for block in (1, 1000):
        monkeypatch.setattr("sparserve.compression.quantize.BLOCK_ELEMENTS", block)
        for same in (weight, weight.T.contiguous().T):
            again = quantize(same, FORMATS[1], "w")
            assert torch.equal(again.codes, whole.codes)
            assert torch.equal(again.scales, whole.scales)
            assert torch.equal(again.zeros, whole.zeros)


class TestRefused:
    @pytest.mark.parametrize("bits", [4, 8])
    def test_beyond_the_largest_scale(self, bits):
        """By their range: 2^19 fits 4 bits, 2^20 does not."""
        format, limit = MatrixFormat(bits, 64), LARGEST * (2**bits - 1)
        fits, too_large = 2.0 ** math.floor(math.log2(limit)), 2.0 ** math.ceil(math.log2(limit))
        weight = torch.zeros(3, 64).bfloat16()
        weight[2, 5] = fits
        assert_as_defined(weight, format)
        weight[2, 6] = -too_large
        with pytest.raises(ScaleOverflow, match=r"^layer 1: up has weights of .* leave it in bf"):
            quantize(weight, format, "layer 1: up")

    def test_values_whose_range_is_beyond_float32(self):
        weight = torch.tensor([[3e38, -3e38]]).bfloat16()
        with pytest.raises(ScaleOverflow, match="w has weights of -3"):
            quantize(weight, FORMATS[0], "w")

    @pytest.mark.parametrize("value_bits", [0, 1, 5])
    def test_bits_that_codes_do_not_have(self, value_bits):
        with pytest.raises(
            ValueError, match=f"value_bits is {value_bits}; in codes of int4 .* 2 to 4"
        ):
            quantize(torch.ones(2, 64).bfloat16(), MatrixFormat(4, 64), "w", value_bits)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_values_that_are_not_finite(self, value):
        weight = torch.ones(300, 64).bfloat16()
        weight[299, 63] = value
        with pytest.raises(NonFiniteWeights, match=r"^w holds values that are not finite"):
            quantize(weight, FORMATS[0], "w")


INT8, INT4 = MatrixFormat(8, 64), MatrixFormat(4, 32)


@pytest.fixture
def layer() -> LayerTensors:
    draw = torch.Generator().manual_seed(2)
    shapes = {"output": (50, 32), "gate": (70, 50), "up": (70, 50), "down": (50, 70)}
    shapes |= dict.fromkeys(("q", "k", "v"), (32, 50))
    weights = {n: torch.randn(s, generator=draw).bfloat16() for n, s in shapes.items()}
    return LayerTensors(**weights, attention_norm=torch.ones(50), mlp_norm=torch.ones(50))


def test_a_layer_follows_its_plan(layer):
    formats = LayerFormats(attention=INT8, gate_up=INT4, down=INT8)
    done = quantize_layer(layer, formats, "")
    of_field = {**dict.fromkeys(("q", "k", "v", "output"), INT8), "gate": INT4, "up": INT4}
    for name, format in of_field.items():
        assert_same(getattr(done, name), quantize(getattr(layer, name), format, ""))
    # Groups run within a neuron, a column of down.
    assert_same(done.down, quantize(layer.down.T.contiguous(), INT8, ""))
    assert done.down.codes.shape == (70, 50)
    assert done.attention_norm is layer.attention_norm


def test_what_a_plan_leaves_in_bfloat16_stays_as_it_is(layer):
    assert quantize_layer(layer, LayerFormats(), "") == layer
    done = quantize_layer(layer, LayerFormats(down=INT8), "")
    for field in fields(layer):
        kept = getattr(done, field.name) is getattr(layer, field.name)
        assert kept == (field.name != "down")


@pytest.mark.parametrize("name", ["q", "k", "v", "output", "gate", "up", "down"])
def test_errors_name_layer_and_tensor(layer, name):
    getattr(layer, name)[-1, -1] = math.nan
    formats = LayerFormats(INT8, INT8, INT8)
    with pytest.raises(NonFiniteWeights, match=f"^layer 7: {name} holds"):
        quantize_layer(layer, formats, "layer 7: ")


def assert_same(one, other):
    assert (one.bits, one.group_size) == (other.bits, other.group_size)
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(one, name), getattr(other, name))
