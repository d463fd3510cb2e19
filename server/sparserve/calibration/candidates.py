"""Settings to measure: cores and thresholds for a row of densities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sparse_kernels.choice import ChoiceKind
from sparserve.calibration.factors import Aim, Factors, LayerTokens, Used
from sparserve.sparsity.chooser import ChoicePlan
from sparserve.sparsity.core import best_neurons, neurons_of
from sparserve.sparsity.index import NeuronIndex, Setting
from sparserve.sparsity.policy import Policy, PolicyKind
from sparserve.sparsity.predictors import predict
from sparserve.sparsity.statistics import PromptStatistics

UNKNOWN = 0.0  # of what a setting costs, until it is measured


def core_setting(shares: torch.Tensor) -> Setting:
    return _setting(PolicyKind.CORE, float(shares.mean()), None, shares, None)


def token_setting(
    choice: ChoiceKind, factors: Factors, aim: Aim, tier: int, reach: int, core: float | None = None
) -> Setting:
    """The choice by token with these numbers of `aim`'s tiers and reaches, inside a core with the share
    `core` of each layer's neurons."""
    looked, *rest = aim.neuron_bytes
    density = (looked + aim.reaches[reach] * sum(rest)) / sum(aim.neuron_bytes)
    thresholds = aim.tiers[tier].of(factors.thresholds[:, tier, reach])
    shares = None if core is None else torch.full((len(thresholds),), core)
    return _setting(PolicyKind.TOKEN, density, choice, shares, thresholds)


def _setting(
    kind: PolicyKind,
    density: float,
    choice: ChoiceKind | None,
    shares: torch.Tensor | None,
    thresholds: torch.Tensor | None,
) -> Setting:
    return Setting(kind, density, UNKNOWN, UNKNOWN, UNKNOWN, choice, shares, thresholds)


def plan_of(setting: Setting, index: NeuronIndex, neurons: torch.Tensor) -> ChoicePlan:
    """How a request with this setting chooses among neurons [layers]; the predictor is the default one."""
    counts = None if setting.shares is None else neurons_of(setting.shares, neurons)
    policy = Policy(setting.kind, density=setting.density, choice=setting.choice)
    return ChoicePlan(policy, setting.density, setting=setting, counts=counts, index=index)


@dataclass(frozen=True, slots=True)
class UsedBy:
    """The activations that `setting` uses, a core or a choice by the gate; `members` bool [windows, layers, neurons] of a core."""

    setting: Setting
    factors: torch.Tensor | None  # [layers, neurons]
    members: torch.Tensor | None

    def __call__(self, layer: int, tokens: LayerTokens) -> torch.Tensor:
        used = tokens.activations
        if self.setting.thresholds is not None:
            assert self.factors is not None
            importance = tokens.gate.abs() * self.factors[layer, : used.shape[1]]
            used = used.masked_fill(importance < self.setting.thresholds[layer, 0], 0)
        if self.members is not None:
            used = used * self.members[tokens.windows, layer, : used.shape[1]]
        return used


def used_by(
    setting: Setting,
    factors: Mapping[ChoiceKind, Factors],
    prompts: Sequence[PromptStatistics],
    index: NeuronIndex,
    neurons: torch.Tensor,
) -> Used:
    """`prompts` of the windows whose tokens it will be asked for."""
    values = None if setting.choice is None else factors[setting.choice].values
    if setting.shares is None:
        return UsedBy(setting, values, None)
    plan = plan_of(setting, index, neurons)
    assert plan.counts is not None
    members = [
        best_neurons(
            predict(plan.policy.predictor, plan.policy.score, own, plan.counts, index)[0],
            plan.counts,
        )
        for own in prompts
    ]
    return UsedBy(setting, values, torch.stack(members))
