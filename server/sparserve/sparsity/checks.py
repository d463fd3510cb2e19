"""What a policy may hold, whatever the model: values in range, and none that its kind has no use for."""

from __future__ import annotations

import math

from sparse_kernels._abi import SK_CHOICE_TOKENS
from sparse_kernels.choice import Score
from sparserve.errors import InvalidRequest
from sparserve.sparsity.policy import DENSE, DraftKind, Policy, PolicyKind, PredictorKind

# Fields of a policy that only some kinds use.
_USED_BY = {
    "density": {PolicyKind.CORE, PolicyKind.TOKEN, PolicyKind.EXACT, PolicyKind.AUTO},
    "target_kl": {PolicyKind.CORE, PolicyKind.TOKEN, PolicyKind.AUTO},
    "choice": {PolicyKind.TOKEN, PolicyKind.EXACT},
    "core_density": {PolicyKind.TOKEN, PolicyKind.EXACT},
    "predictor": {PolicyKind.CORE, PolicyKind.TOKEN, PolicyKind.EXACT, PolicyKind.AUTO},
    "score": {PolicyKind.CORE, PolicyKind.TOKEN, PolicyKind.EXACT, PolicyKind.AUTO},
    "alpha": {PolicyKind.CORE, PolicyKind.TOKEN, PolicyKind.EXACT, PolicyKind.AUTO},
    "first_layer": {PolicyKind.CORE},
    "last_layer": {PolicyKind.CORE},
    "refresh_interval": {PolicyKind.CORE, PolicyKind.TOKEN, PolicyKind.AUTO},
    "draft": {PolicyKind.EXACT},
    "draft_tokens": {PolicyKind.EXACT},
}
MAX_DRAFT_TOKENS = SK_CHOICE_TOKENS - 1
MAX_REFRESH_INTERVAL = 4096


def check_policy(policy: Policy, num_layers: int) -> None:
    """Raises InvalidRequest with field "sparsity.…"."""
    _refuse_unused(policy)
    for name in ("density", "core_density", "alpha"):
        _check_share(name, getattr(policy, name))
    if policy.target_kl is not None and not (0 < policy.target_kl < math.inf):
        raise InvalidRequest(
            "sparsity.target_kl",
            f"target_kl is {policy.target_kl:g}; it must be above 0 and finite",
        )
    if policy.target_kl is not None and policy.density is not None:
        raise InvalidRequest(
            "sparsity.target_kl", "give density or target_kl, not both: each decides what is read"
        )
    if policy.alpha is not None and policy.score is Score.NORM:
        raise InvalidRequest(
            "sparsity.alpha",
            "alpha is for counts; take score count or signed_count, or leave it out",
        )
    if policy.predictor is PredictorKind.SIMILARITY and policy.score is not Score.NORM:
        raise InvalidRequest(
            "sparsity.score",
            f"score is {policy.score.value}, and the clusters of predictor similarity are of norm scores; "
            "take score norm, or another predictor",
        )
    _check_layers(policy, num_layers)
    _check_range("refresh_interval", policy.refresh_interval, 0, MAX_REFRESH_INTERVAL)
    _check_range("draft_tokens", policy.draft_tokens, 1, MAX_DRAFT_TOKENS)
    if policy.draft is not DraftKind.TOKEN and policy.kind is PolicyKind.EXACT:
        _refuse(policy, ("choice", "core_density"), "drafts by token")


def _refuse_unused(policy: Policy) -> None:
    for name, kinds in _USED_BY.items():
        if policy.kind not in kinds and getattr(policy, name) != getattr(DENSE, name):
            _refuse(policy, (name,), "policy " + " or ".join(sorted(kind.value for kind in kinds)))


def _refuse(policy: Policy, names: tuple[str, ...], purpose: str) -> None:
    for name in names:
        if getattr(policy, name) != getattr(DENSE, name):
            raise InvalidRequest(
                f"sparsity.{name}", f"{name} is for {purpose}, not for policy {policy.kind.value}"
            )


def _check_share(name: str, value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise InvalidRequest(
            f"sparsity.{name}", f"{name} is {value:g}; it must be above 0 and at most 1"
        )


def _check_range(name: str, value: int | None, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        raise InvalidRequest(
            f"sparsity.{name}", f"{name} is {value}; it must be from {least} to {most}"
        )


def _check_layers(policy: Policy, num_layers: int) -> None:
    first, last = policy.first_layer, policy.last_layer
    _check_range("first_layer", first, 0, num_layers - 1)
    _check_range("last_layer", last, 1, num_layers)
    if first is not None and last is not None and first >= last:
        raise InvalidRequest(
            "sparsity.first_layer",
            f"first_layer is {first} and last_layer {last}: no layer is left to choose neurons in",
        )
