"""Settings to measure: cores and thresholds for a row of densities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sparse_kernels.choice import ChoiceKind
from sparserve.calibration.factors import Factors, LayerTokens, Used
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
    choice: ChoiceKind,
    factors: Factors,
    neuron_bytes: Sequence[float],
    reach: float,
    whole: float,
    core: float | None = None,
) -> Setting | None:
    """A choice by token that reads what looking costs, and of what is then left the share `reach`.

    Of the neurons used, the share `whole` is read whole; a share of 1 in every layer, since budgets by
    layer gained nothing here. None where more than all neurons would be used.
    """
    looked, used, completed = neuron_bytes
    share = reach * (used + completed) / (used + whole * completed)
    if share > 1:
        return None
    layers = len(factors.values)
    thresholds = torch.stack(
        [factors.threshold(torch.full((layers,), part)) for part in (share, share * whole)], dim=1
    )
    density = (looked + reach * (used + completed)) / sum(neuron_bytes)
    shares = None if core is None else torch.full((layers,), core)
    return _setting(PolicyKind.TOKEN, density, choice, shares, thresholds)


def _setting(
    kind: PolicyKind,
    density: float,
    choice: ChoiceKind | None,
    shares: torch.Tensor | None,
    thresholds: torch.Tensor | None,
) -> Setting:
    reads = (UNKNOWN, UNKNOWN, UNKNOWN)
    return Setting(kind, density, UNKNOWN, UNKNOWN, UNKNOWN, reads, choice, shares, thresholds)


def plan_of(setting: Setting, index: NeuronIndex) -> ChoicePlan:
    """How a request with this setting chooses; the predictor is the default one."""
    neurons = index.prior.shape[1]
    counts = None if setting.shares is None else neurons_of(setting.shares, neurons)
    policy = Policy(setting.kind, density=setting.density, choice=setting.choice)
    return ChoicePlan(policy, setting.density, setting=setting, counts=counts, index=index)


@dataclass(frozen=True, slots=True)
class UsedBy:
    """The activations that `setting` uses; `members` bool [windows, layers, neurons] of a core."""

    setting: Setting
    factors: torch.Tensor | None  # [layers, neurons]
    members: torch.Tensor | None

    def __call__(self, layer: int, tokens: LayerTokens) -> torch.Tensor:
        used = tokens.activations
        if self.setting.thresholds is not None:
            assert self.factors is not None
            use, whole = self.setting.thresholds[layer]
            if self.setting.choice is ChoiceKind.GATE:
                used = used.masked_fill(tokens.gate.abs() * self.factors[layer] < use, 0)
            else:
                assert tokens.approximate is not None
                importance = tokens.approximate.abs() * self.factors[layer]
                used = torch.where(importance < whole, tokens.approximate, used)
                used = used.masked_fill(importance < use, 0)
        if self.members is not None:
            used = used * self.members[tokens.windows, layer]
        return used


def used_by(
    setting: Setting,
    factors: Mapping[ChoiceKind, Factors],
    prompts: Sequence[PromptStatistics],
    index: NeuronIndex,
) -> Used:
    """`prompts` of the windows whose tokens it will be asked for."""
    values = None if setting.choice is None else factors[setting.choice].values
    if setting.shares is None:
        return UsedBy(setting, values, None)
    plan = plan_of(setting, index)
    assert plan.counts is not None
    members = [
        best_neurons(
            predict(plan.policy.predictor, plan.policy.score, own, plan.counts, index)[0],
            plan.counts,
        )
        for own in prompts
    ]
    return UsedBy(setting, values, torch.stack(members))
