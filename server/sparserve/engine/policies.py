"""What a server lets requests ask for: the operator's default and bounds, and what the model can follow."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from sparserve.errors import InvalidRequest, SparsityUnavailable
from sparserve.sparsity.chooser import ChoicePlan, Chooser
from sparserve.sparsity.policy import Policy, PolicyKind

# Those whose text is not the dense model's, so that bounds of quality are for them.
_LOSSY = (PolicyKind.CORE, PolicyKind.TOKEN, PolicyKind.AUTO)


@dataclass(frozen=True, slots=True)
class PolicyRules:
    """The operator's part."""

    default: PolicyKind = PolicyKind.DENSE  # of requests that name none
    # Of requests that name neither; None: the chooser's own.
    default_density: float | None = None
    default_target_kl: float | None = None
    min_density: float = 0.0
    max_target_kl: float = math.inf
    allowed: Collection[PolicyKind] = tuple(PolicyKind)


class Policies:
    """A request's policy, completed, checked and planned. Keeps no state, so any thread may call it."""

    def __init__(self, chooser: Chooser, rules: PolicyRules = PolicyRules()) -> None:
        self._chooser = chooser
        self.rules = rules
        self.kinds = tuple(kind for kind in chooser.policies if kind in rules.allowed)

    @property
    def has_index(self) -> bool:
        """A calibrated one; without it there is nothing that `auto` could go by."""
        return PolicyKind.AUTO in self._chooser.policies

    @property
    def default(self) -> PolicyKind:
        return self.rules.default

    def complete(self, policy: Policy) -> Policy:
        """With the operator's defaults. Raises InvalidRequest of what its bounds exclude, and
        SparsityUnavailable of a policy that is not allowed."""
        rules, kind = self.rules, policy.kind
        if kind not in rules.allowed:
            raise SparsityUnavailable(
                "sparsity.policy",
                f"policy {kind.value} is not allowed on this server; allowed: "
                f"{', '.join(allowed.value for allowed in self.kinds)}",
            )
        if kind is PolicyKind.DENSE:
            return self._dense(policy)
        if policy.density is None and policy.target_kl is None and kind is not PolicyKind.EXACT:
            policy = self._with_default_amount(policy)
        if kind in _LOSSY:
            self._check_bounds(policy)
        return policy

    def plan(self, policy: Policy) -> ChoicePlan:
        """Of a complete policy. Raises as `Chooser.plan`.

        What a target or `auto` comes to keeps to the operator's bounds as well: more is read instead.
        """
        plan = self._chooser.plan(policy)
        resolved, least = plan.policy, self.rules.min_density
        if resolved.kind not in self.rules.allowed:
            return self._chooser.plan(Policy())
        if resolved.kind in _LOSSY and plan.density < least:
            return self._chooser.plan(replace(resolved, density=least))
        return plan

    def _dense(self, policy: Policy) -> Policy:
        """Dense reads everything and loses nothing, so it meets any target."""
        if policy.density not in (None, 1):
            others = [kind.value for kind in self.kinds if kind is not PolicyKind.DENSE]
            raise InvalidRequest(
                "sparsity.density",
                f"density is {policy.density:g}, but policy dense reads all neurons; take "
                f"{' or '.join(others) or 'density 1'}",
            )
        return replace(policy, density=None, target_kl=None)

    def _with_default_amount(self, policy: Policy) -> Policy:
        density = self.rules.default_density
        if policy.kind is not PolicyKind.AUTO and density is not None:
            return replace(policy, density=density)
        if policy.kind is PolicyKind.CORE:
            # One that was never calibrated has no target to go by: the chooser knows a density.
            return policy
        return replace(policy, target_kl=self.rules.default_target_kl)

    def _check_bounds(self, policy: Policy) -> None:
        rules = self.rules
        if policy.density is not None and policy.density < rules.min_density:
            raise InvalidRequest(
                "sparsity.density",
                f"density is {policy.density:g}; this server reads {rules.min_density:g} at least",
            )
        if policy.target_kl is not None and policy.target_kl > rules.max_target_kl:
            raise InvalidRequest(
                "sparsity.target_kl",
                f"target_kl is {policy.target_kl:g}; this server grants {rules.max_target_kl:g} at most",
            )
