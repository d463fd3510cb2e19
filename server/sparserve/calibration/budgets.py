"""Shares of the layers' neurons: more where leaving some out was measured to cost more."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import torch

STEP = 1 / 64  # of a layer's neurons, given at a time
BAND = 0.2  # a layer's share differs from the mean by no more
TINY = 1e-9


def allocate(losses: torch.Tensor, grid: Sequence[float], density: float) -> torch.Tensor:
    """Shares float32 [layers] with mean `density`.

    `losses` [layers, len(grid)] are KLs with one layer alone sparse, at the rising shares `grid`. They are
    taken to add up; shares go, step by step, where they save most, of equal savings to the layer that has
    least. Logarithms run straight between grid points and beyond, down to 0 at 1.
    """
    curves = [_Loss(grid, row.tolist()) for row in losses]
    scale = max(float(losses.max()), TINY)
    least, most = max(STEP, density - BAND), min(1.0, density + BAND)
    shares = [min(least, density)] * len(curves)
    left = density * len(curves) - sum(shares)
    while left > 1e-9:
        # Gains by share, since a last step is shorter; rounded, so that what is equal but for floats' last
        # bits counts as equal.
        _, _, best, step = max(
            (round(curve.saved(own, step) / step / scale, 9), -own, n, step)
            for n, (curve, own) in enumerate(zip(curves, shares, strict=True))
            if (step := min(STEP, left, most - own)) > 1e-9
        )
        shares[best] += step
        left -= step
    return torch.tensor(shares).clamp(max=1)


class _Loss:
    """One layer's, as the largest convex function below it: steps then save less and less."""

    def __init__(self, grid: Sequence[float], losses: Sequence[float]) -> None:
        falling: list[float] = []
        for loss in losses:
            falling.append(min(max(loss, TINY), falling[-1] if falling else math.inf))
        measured = [*zip(grid, falling, strict=True)]
        shares = [n * STEP for n in range(round(1 / STEP) + 1)]
        self._corners = _convex([(share, _straight(measured, share)) for share in shares])

    def saved(self, share: float, step: float) -> float:
        return self._at(share) - self._at(share + step)

    def _at(self, share: float) -> float:
        place = bisect_left(self._corners, (share,))
        (a, first), (b, second) = self._corners[max(place - 1, 0) :][:2]
        return first + (second - first) * (min(share, 1.0) - a) / (b - a)


def _straight(points: Sequence[tuple[float, float]], share: float) -> float:
    (a, first), *rest = points
    for b, second in rest:
        if share < b:
            return first * math.exp(math.log(second / first) / (b - a) * (share - a))
        a, first = b, second
    return first * max(0.0, 1 - share) / (1 - a)


def _convex(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the lower convex hull of points by rising share (Andrew's monotone chain)."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (a, first), (b, second) = hull[-2:]
            if (second - first) * (x - a) < (y - first) * (b - a):
                break
            hull.pop()
        hull.append((x, y))
    return hull
