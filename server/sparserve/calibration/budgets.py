"""Shares of the layers' neurons: more where leaving some out was measured to cost more."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

STEP = 1 / 64  # of a layer's neurons, given at a time
BAND = 0.2  # a layer's share differs from the mean by no more
TINY = 1e-9


def allocate(losses: torch.Tensor, grid: Sequence[float], density: float) -> torch.Tensor:
    """Shares float32 [layers] with mean `density`.

    `losses` [layers, len(grid)] are KLs with one layer alone sparse, at the rising shares `grid`. They are
    taken to add up; shares go, step by step, where they save most. Logarithms run straight between grid
    points and beyond, down to 0 at 1.
    """
    curves = [_Loss(grid, row.tolist()) for row in losses]
    least, most = max(STEP, density - BAND), min(1.0, density + BAND)
    shares = [least] * len(curves)
    left = density * len(curves) - sum(shares)
    while left > 1e-9:
        step = min(STEP, left)
        gains = [
            curve.at(own) - curve.at(own + step) if own + step <= most + 1e-9 else -math.inf
            for curve, own in zip(curves, shares, strict=True)
        ]
        best = max(range(len(gains)), key=gains.__getitem__)
        if gains[best] == -math.inf:  # a last piece is smaller than a step
            best = min(range(len(gains)), key=shares.__getitem__)
        shares[best] += step
        left -= step
    return torch.tensor(shares).clamp(max=1)


class _Loss:
    """One layer's, falling and convex enough for steps: never above what a smaller share costs."""

    def __init__(self, grid: Sequence[float], losses: Sequence[float]) -> None:
        falling: list[float] = []
        for loss in losses:
            falling.append(min(max(loss, TINY), falling[-1] if falling else math.inf))
        self._points = [*zip(grid, falling, strict=True)]

    def at(self, share: float) -> float:
        (a, first), *rest = self._points
        for b, second in rest:
            if share < b:
                slope = math.log(second / first) / (b - a)
                return first * math.exp(slope * (share - a))
            a, first = b, second
        return first * max(0.0, 1 - share) / (1 - a)
