"""The model's functions against their definitions, written out in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from sparserve.model.llama import (
    apply_rope,
    attention,
    gate_and_up,
    project_heads,
    rms_norm,
    rope_frequencies,
    rope_tables,
)
from sparserve.model.rope import RopeConfig
from sparserve.model.weights import LayerWeights

LLAMA31 = RopeConfig(
    theta=500000.0,
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


@pytest.fixture(params=range(3))
def random(request: pytest.FixtureRequest) -> torch.Generator:
    return torch.Generator().manual_seed(request.param)


# --- norm ---


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rms_norm_is_its_definition(random, scale, eps):
    x = torch.randn(5, 72, generator=random) * scale
    weight = torch.randn(72, generator=random)
    mean_square = x.double().square().mean(dim=1, keepdim=True)
    expected = x.double() / (mean_square + eps).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, eps), expected.float(), atol=1e-6, rtol=1e-5)


# --- rotary position embedding ---


def defined_frequencies(rope: RopeConfig, head_dim: int) -> list[float]:
    """arXiv 2104.09864, and for llama3 `apply_scaling` of Meta's llama-models."""
    frequencies = []
    for pair in range(head_dim // 2):
        frequency = rope.theta ** (-2 * pair / head_dim)
        if rope.kind == "linear":
            frequency /= rope.factor
        if rope.kind == "llama3":
            wavelength, context = 2 * math.pi / frequency, rope.original_max_position_embeddings
            if wavelength > context / rope.low_freq_factor:
                frequency /= rope.factor
            elif wavelength >= context / rope.high_freq_factor:
                smooth = (context / wavelength - rope.low_freq_factor) / (
                    rope.high_freq_factor - rope.low_freq_factor
                )
                frequency = (1 - smooth) * frequency / rope.factor + smooth * frequency
        frequencies.append(frequency)
    return frequencies


@pytest.mark.parametrize("head_dim", [2, 10, 64, 128])
@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(),
        RopeConfig(theta=1e6),
        RopeConfig(kind="linear", factor=4.0),
        LLAMA31,
        RopeConfig(10000.0, "llama3", 32.0, 2.0, 3.0, 256),
    ],
    ids=["default", "theta", "linear", "llama3.1", "other llama3"],
)
def test_rope_frequencies_are_their_definition(rope, head_dim):
    expected = torch.tensor(defined_frequencies(rope, head_dim), dtype=torch.float64)
    actual = rope_frequencies(rope, head_dim).double()
    torch.testing.assert_close(actual, expected, atol=0, rtol=1e-5)


def test_llama31_scaling_keeps_interpolates_and_divides():
    ratio = rope_frequencies(RopeConfig(theta=LLAMA31.theta), 128) / rope_frequencies(LLAMA31, 128)
    assert ratio[0] == 1
    assert ratio[-1] == 8
    assert ((ratio > 1) & (ratio < 8)).sum() >= 3
    assert bool((ratio.diff() >= 0).all())


def test_rope_factors_divide_the_frequencies_and_linear_scaling_comes_on_top():
    factors = torch.tensor([1.0, 2.0, 5.0])
    plain = rope_frequencies(RopeConfig(), 6)
    torch.testing.assert_close(rope_frequencies(RopeConfig(), 6, factors), plain / factors)
    linear = RopeConfig(kind="linear", factor=4.0)
    torch.testing.assert_close(rope_frequencies(linear, 6, factors), plain / factors / 4)


def defined_yarn(rope: RopeConfig, head_dim: int) -> list[float]:
    """arXiv 2309.00071, section 3.2 with its bounds in rotations, by pairs as in its code."""
    frequencies = []
    for pair, frequency in enumerate(defined_frequencies(RopeConfig(rope.theta), head_dim)):
        bounds = [
            head_dim
            * math.log(rope.original_max_position_embeddings / (2 * math.pi * rotations))
            / (2 * math.log(rope.theta))
            for rotations in (rope.beta_fast, rope.beta_slow)
        ]
        if rope.truncate:
            bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
        low, high = max(bounds[0], 0), min(bounds[1], head_dim - 1)
        ramp = min(max((pair - low) / (high - low), 0.0), 1.0)
        frequencies.append(ramp * frequency / rope.factor + (1 - ramp) * frequency)
    return frequencies


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_frequencies_are_their_definition(head_dim, truncate):
    rope = RopeConfig(
        1e6, "yarn", 4.0, original_max_position_embeddings=4096, beta_fast=24.0, truncate=truncate
    )
    actual = rope_frequencies(rope, head_dim).double()
    expected = torch.tensor(defined_yarn(rope, head_dim), dtype=torch.float64)
    torch.testing.assert_close(actual, expected, atol=0, rtol=1e-5)
    ratio = rope_frequencies(RopeConfig(1e6), head_dim) / actual
    assert ratio[0] == pytest.approx(1)
    assert ratio[-1] == pytest.approx(4)
    assert ((ratio > 1.01) & (ratio < 3.99)).sum() >= 3


def test_dynamic_frequencies_are_those_of_a_sequence_that_ends_with_the_position():
    rope = RopeConfig(kind="dynamic", factor=2.0, original_max_position_embeddings=100)
    table = rope_frequencies(rope, 16)
    assert table.shape == (200, 8)
    assert torch.equal(table[:100], rope_frequencies(RopeConfig(), 16).expand(100, 8))
    for position in (100, 150, 199):
        theta = 10000 * (2 * (position + 1) / 100 - 1) ** (16 / 14)
        expected = rope_frequencies(RopeConfig(theta), 16)
        torch.testing.assert_close(table[position], expected, atol=0, rtol=1e-5)
    at = torch.tensor([3, 150, 500])
    cos, sin = rope_tables(at, table)
    assert torch.equal(cos[1, 0], (150 * table[150]).cos())
    assert torch.equal(sin[2, 0], (500 * table[199]).sin()), "beyond the table: its last row"
    for positions in (50, 100, 170):
        assert torch.equal(rope_frequencies(rope, 16, None, positions), table[:positions])
    endless = RopeConfig(kind="dynamic", factor=9.0, original_max_position_embeddings=2**31 - 1)
    assert rope_frequencies(endless, 16, None, 64).shape == (64, 8)


def test_scale_multiplies_what_is_rotated(random):
    x = torch.randn(4, 2, 8, generator=random)
    tables = rope_tables(torch.arange(4), rope_frequencies(RopeConfig(), 8), scale=1.5)
    plain = rope_tables(torch.arange(4), rope_frequencies(RopeConfig(), 8))
    torch.testing.assert_close(apply_rope(x, *tables), apply_rope(x, *plain) * 1.5)


@pytest.mark.parametrize("head_dim", [2, 24, 64])
def test_rope_turns_each_pair_of_halves_by_position_times_frequency(random, head_dim):
    positions = torch.randint(0, 1000, (9,), generator=random)
    x = torch.randn(9, 3, head_dim, generator=random)
    frequencies = rope_frequencies(RopeConfig(), head_dim)
    actual = apply_rope(x, *rope_tables(positions, frequencies))

    half = head_dim // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    angles = positions.double()[:, None] * torch.tensor(
        defined_frequencies(RopeConfig(), head_dim), dtype=torch.float64
    )
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None, :]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    # an angle of a thousand radians is known to 1e-4 in float32
    torch.testing.assert_close(actual.double(), expected, atol=1e-3, rtol=0)
    assert torch.equal(apply_rope(x, *rope_tables(torch.zeros(9), frequencies)), x)


def test_a_rotated_product_depends_on_the_distance_alone(random):
    q, k = torch.randn(2, 1, 1, 64, generator=random)
    frequencies = rope_frequencies(RopeConfig(), 64)

    def product(at: int, before: int) -> float:
        tables = [rope_tables(torch.tensor([p]), frequencies) for p in (at, before)]
        return float((apply_rope(q, *tables[0]) * apply_rope(k, *tables[1])).sum())

    assert product(7, 4) == pytest.approx(product(203, 200), abs=1e-3)
    assert product(7, 4) != pytest.approx(product(4, 7), abs=1e-2)


# --- attention ---


def defined_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    rows, heads, head_dim = q.shape
    out = torch.zeros(rows, heads, head_dim, dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            shared = head // (heads // k.shape[0])  # consecutive heads share a KV head
            keys, values = k[shared, visible[row]].double(), v[shared, visible[row]].double()
            weights = (keys @ q[row, head].double() / math.sqrt(head_dim)).exp()
            out[row, head] = weights @ values / weights.sum()
    return out.flatten(1).float()


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 1), (6, 2), (6, 3), (6, 6)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_its_definition(random, heads, kv_heads, masked):
    rows, context, head_dim = 5, 11, 8
    q = torch.randn(rows, heads, head_dim, generator=random)
    k, v = torch.randn(2, kv_heads, context, head_dim, generator=random)
    visible = torch.ones(rows, context, dtype=torch.bool)
    mask = None
    if masked:
        visible = torch.rand(rows, context, generator=random) < 0.4
        visible[:, 3] = True  # softmax over nothing is undefined
        mask = torch.zeros(rows, context).masked_fill_(~visible, float("-inf"))
    expected = defined_attention(q, k, v, visible)
    torch.testing.assert_close(attention(q, k, v, mask), expected, atol=1e-5, rtol=1e-5)


def test_attention_of_large_scores_does_not_overflow(random):
    q, k, v = (torch.randn(1, 2, 8, generator=random) * scale for scale in (1e3, 1e3, 1.0))
    out = attention(q, k.view(2, 1, 8), v.view(2, 1, 8), None)
    torch.testing.assert_close(out, v.reshape(1, 16))


def test_heads_are_projected_biased_and_normed(random):
    x, weight = torch.randn(5, 12, generator=random), torch.randn(3 * 8, 12, generator=random)
    bias, norm = torch.randn(3 * 8, generator=random), torch.randn(8, generator=random)
    plain = x.double() @ weight.double().T
    for b, n in ((None, None), (bias, None), (None, norm), (bias, norm)):
        heads = (plain if b is None else plain + b.double()).view(5, 3, 8)
        if n is not None:
            heads = heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt() * n.double()
        actual = project_heads(F.linear, x, weight, b, n, 1e-5, 8)
        torch.testing.assert_close(actual.double(), heads, atol=1e-5, rtol=1e-5)


# --- feed-forward ---


def test_silu_of_gate_times_up(random):
    x = torch.randn(4, 12, generator=random)
    gate, up = torch.randn(2, 20, 12, generator=random)
    unused = torch.empty(0)
    layer = LayerWeights(*[unused] * 6, w_gate=gate, w_up=up, w_down=unused)
    g, u = x.double() @ gate.double().T, x.double() @ up.double().T
    expected = g / (1 + (-g).exp()) * u
    gate, up = gate_and_up(F.linear, x, layer)
    actual = gate * up
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
