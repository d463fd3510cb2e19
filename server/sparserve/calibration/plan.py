"""What a calibration is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparserve.calibration.factors import Tiers


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    core_densities: Sequence[float] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    # Of what is left of a neuron once it was looked at.
    reaches: Sequence[float] = (0.1, 0.15, 0.22, 0.3, 0.4, 0.5, 0.65, 0.85)
    # Tried of a choice by planes, with down whole and in planes.
    tiers: Sequence[Tiers] = (Tiers(0), Tiers(0.8), Tiers(1.0), Tiers(1.4))
    down_tiers: Sequence[Tiers] = (Tiers(0.8, 5), Tiers(1.0, 3), Tiers(1.4, 8), Tiers(1.4, 12))
    token_core: float = 0.7  # share of a core that tokens choose in
    token_core_up_to: float = 0.4  # reach; beyond it what the core leaves out decides the cost
    loss_grid: Sequence[float] = (0.3, 0.5, 0.7)
    loss_windows: int = 4
    trial_windows: int = 8
    correction_rank: int = 32
    corrected_up_to: float = 0.7  # denser settings have little to correct


QUICK = Effort(
    core_densities=(0.5, 0.7, 0.9),
    reaches=(0.15, 0.3, 0.5, 0.8),
    tiers=(Tiers(1.0),),
    down_tiers=(Tiers(1.4, 8),),
    loss_grid=(0.5,),
    loss_windows=1,
    trial_windows=2,
    correction_rank=0,
)


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    files: Sequence[Path]
    out: Path
    windows: int
    prompt_tokens: int
    decode_tokens: int
    effort: Effort = field(default_factory=Effort)
