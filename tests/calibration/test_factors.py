"""Thresholds read what they are to read; corrections are the best of their rank."""

import pytest
import torch

from sparse_kernels.choice import ChoiceKind
from sparse_kernels.formats import DecoderFormats, MatrixFormat
from sparserve.calibration.factors import (
    RIDGE,
    Aim,
    Tiers,
    by_planes,
    fit_corrections,
    fit_factors,
)
from sparserve.calibration.layers import walk

TOKENS = torch.randint(0, 256, (6, 50), generator=torch.Generator().manual_seed(3))
INT8 = MatrixFormat(8, 64, 4)
PLANES = DecoderFormats(INT8, INT8, INT8, INT8)
REACHES = (0.1, 0.4, 0.8)


def ignore(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("tiers", [Tiers(), Tiers(0.8), Tiers(1.4, 8.0)])
def test_thresholds_read_the_share_they_aim_at_in_every_layer(tiny_bfloat16, tiers):
    each = (20.0, 6.0, 10.0, 4.0)
    aim = Aim(each, (tiers,), REACHES)
    found = fit_factors(tiny_bfloat16, PLANES, TOKENS, {ChoiceKind.PLANES: aim}, ignore)
    factors = found[ChoiceKind.PLANES]
    for layer, (mlp, inputs) in enumerate(walk(tiny_bfloat16, PLANES, TOKENS)):
        _, importance, noise = by_planes(mlp, inputs[:, 1:].flatten(0, 1))
        for place, reach in enumerate(REACHES):
            use, whole, down = tiers.of(factors.thresholds[:, 0, place])[layer]
            used = importance >= use
            masks = (used, used & (noise >= whole), used & (importance >= down))
            read = sum(n * mask.double().mean() for n, mask in zip(each[1:], masks, strict=True))
            assert float(read) / sum(each[1:]) == pytest.approx(reach, abs=0.002)


def test_a_gates_factor_is_the_mean_up_times_the_length_of_down(tiny_model):
    aim = Aim((1.0, 2.0, 0.0, 0.0), (Tiers(),), REACHES)
    found = fit_factors(tiny_model, DecoderFormats(), TOKENS, {ChoiceKind.GATE: aim}, ignore)
    for layer, (mlp, inputs) in enumerate(walk(tiny_model, DecoderFormats(), TOKENS)):
        up = inputs[:, 1:].flatten(0, 1) @ tiny_model.weights.layers[layer].w_up.T
        expected = up.abs().mean(dim=0) * tiny_model.weights.layers[layer].w_down.norm(dim=0)
        torch.testing.assert_close(found[ChoiceKind.GATE].values[layer], expected)
        torch.testing.assert_close(mlp.down, tiny_model.weights.layers[layer].w_down.T)


def test_a_correction_is_the_best_map_of_its_rank(tiny_model):
    """Against least squares over inputs with the ridge's rows below, its fitted values cut by an SVD
    (Eckart and Young)."""
    kept = torch.arange(tiny_model.config.intermediate_size) % 3 > 0

    def used(layer, tokens):
        return tokens.activations * kept

    [pairs] = fit_corrections(tiny_model, DecoderFormats(), TOKENS, [used], 5, ignore)
    for (mlp, inputs), (first, second) in zip(
        walk(tiny_model, DecoderFormats(), TOKENS), pairs, strict=True
    ):
        x = inputs[:, 1:].flatten(0, 1).double()
        y = (mlp.activations(x.float()) * ~kept @ mlp.down).double()
        ridge = (RIDGE * x.square().sum(dim=0).mean()).sqrt()
        tall = torch.cat((x, ridge * torch.eye(x.shape[1], dtype=torch.float64)))
        aims = torch.cat((y, torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)))
        fitted = tall @ torch.linalg.lstsq(tall, aims).solution
        u, s, v = torch.linalg.svd(fitted, full_matrices=False)
        best = (u[:, :5] * s[:5] @ v[:5])[: len(x)]
        found = x @ first.double().T @ second.double()
        assert (found - best).norm() < 0.01 * best.norm()  # bfloat16
        assert (y - found).norm() < y.norm()
        assert first.shape == second.shape == (5, x.shape[1])
