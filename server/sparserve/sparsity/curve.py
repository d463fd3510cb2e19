"""The calibrated curve: what may be read at what cost, between the settings that were measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from sparserve.sparsity.index import Setting

TINY = 1e-12  # what a KL of 0 counts as: its logarithm is taken


@dataclass(frozen=True, slots=True)
class Curve:
    """Settings of one kind by rising density; dense is the end of all of them.

    Between two the logarithm of the KL runs straight over the density; between the last and dense the KL
    itself, down to 0. A setting never counts as better than one that reads more.
    """

    settings: Sequence[Setting]

    @classmethod
    def of(cls, settings: Iterable[Setting]) -> Curve:
        """Of at least one setting."""
        falling = sorted(settings, key=lambda own: own.density, reverse=True)
        rising: list[Setting] = []
        for own in falling:
            worst = rising[-1] if rising else own
            rising.append(
                replace(
                    own,
                    kl=max(own.kl, worst.kl, TINY),
                    kl_p95=max(own.kl_p95, worst.kl_p95, TINY),
                    top1=min(own.top1, worst.top1),
                )
            )
        return cls(rising[::-1])

    @property
    def least(self) -> float:
        """Density that it begins at."""
        return self.settings[0].density

    def at(self, density: float) -> Setting:
        """The setting that reads `density`, of `least` to 1."""
        above = next((i for i, s in enumerate(self.settings) if s.density >= density), None)
        if above is None:
            return _towards_dense(self.settings[-1], density)
        if above == 0 or self.settings[above].density == density:
            return self.settings[above]
        return _between(self.settings[above - 1], self.settings[above], density)

    def density_for(self, target_kl: float) -> float | None:
        """The least density whose predicted KL is not above `target_kl`; None where that is below 1
        nowhere."""
        sparser = None
        for own in self.settings:
            if own.kl <= target_kl:
                if sparser is None:
                    return own.density
                way = math.log(sparser.kl / target_kl) / math.log(sparser.kl / own.kl)
                return min(sparser.density + way * (own.density - sparser.density), own.density)
            sparser = own
        assert sparser is not None
        density = sparser.density + (1 - target_kl / sparser.kl) * (1 - sparser.density)
        return density if density < 1 else None


def _between(low: Setting, high: Setting, density: float) -> Setting:
    way = (density - low.density) / (high.density - low.density)
    nearer = low if way < 0.5 else high
    return replace(
        nearer,  # and its correction
        density=density,
        kl=_geometric(low.kl, high.kl, way),
        kl_p95=_geometric(low.kl_p95, high.kl_p95, way),
        top1=low.top1 + way * (high.top1 - low.top1),
        shares=_mixed(low.shares, high.shares, way),
        thresholds=_mixed(low.thresholds, high.thresholds, way),
    )


def _towards_dense(last: Setting, density: float) -> Setting:
    way = (density - last.density) / (1 - last.density)
    shares, thresholds = last.shares, last.thresholds
    return replace(
        last,
        density=density,
        kl=last.kl * (1 - way),
        kl_p95=last.kl_p95 * (1 - way),
        top1=last.top1 + way * (1 - last.top1),
        shares=None if shares is None else _mixed(shares, torch.ones_like(shares), way),
        thresholds=None
        if thresholds is None
        else _mixed(thresholds, torch.zeros_like(thresholds), way),
    )


def _geometric(low: float, high: float, way: float) -> float:
    return math.exp((1 - way) * math.log(low) + way * math.log(high))


def _mixed(low: torch.Tensor | None, high: torch.Tensor | None, way: float) -> torch.Tensor | None:
    """Straight from `low` to `high`; where one is infinite, the nearer."""
    if low is None or high is None:
        return None
    nearer = low if way < 0.5 else high
    return torch.where(low.isfinite() & high.isfinite(), torch.lerp(low, high, way), nearer)
