"""From a request's policy and its prompt to the neurons that its decode steps read.

`Chooser.plan` is for when a request comes in: everything that can be wrong with its policy is told
then. `ChoicePlan.choose` is for when its prompt is in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from sparse_kernels.choice import ALL_NEURONS, ChoiceKind, NeuronChoice, Score, core_words
from sparserve.errors import InvalidRequest, SparsityUnavailable
from sparserve.sparsity.checks import check_policy
from sparserve.sparsity.core import best_neurons, coverage, neurons_of
from sparserve.sparsity.curve import Curve
from sparserve.sparsity.index import NeuronIndex, Setting
from sparserve.sparsity.policy import DENSE, DraftKind, Policy, PolicyKind, PredictorKind
from sparserve.sparsity.predictors import predict
from sparserve.sparsity.statistics import PromptStatistics

DEFAULT_CORE_DENSITY = 0.7
DEFAULT_TARGET_KL = 0.05  # nats per token, of policies that go by the curve
DEFAULT_DRAFT_DENSITY = 0.5
# Found in a text they cost nothing, and the fewer are tried the more of them were wrong.
DEFAULT_DRAFT_TOKENS = {DraftKind.NGRAM: 12, DraftKind.CORE: 4, DraftKind.TOKEN: 4}
# Of counts: shares of all, and of the positive activations (CoreInfer's own).
DEFAULT_ALPHA = {Score.COUNT: 0.1, Score.SIGNED_COUNT: 0.4}
# Where so much is read anyway, `auto` leaves nothing out: choosing costs time too.
NEARLY_DENSE = 0.95
# Cores whose shares differ by no more were measured as one.
SAME_CORE = 0.02


class ModelShape(Protocol):
    """Of a ModelConfig."""

    @property
    def num_layers(self) -> int: ...
    @property
    def layer_neurons(self) -> tuple[int, ...]: ...


class BackendReads(Protocol):
    """Of a BackendInfo."""

    @property
    def choices(self) -> AbstractSet[ChoiceKind]: ...
    @property
    def neuron_bytes(self) -> Mapping[ChoiceKind | None, tuple[float, ...]]: ...


@dataclass(frozen=True, slots=True)
class Chosen:
    choice: NeuronChoice
    coverage: float | None  # share of the prompt's score that the core holds; None without a core
    stable: bool | None  # whether the prompt's core no longer changes; None without one


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """A policy with all that does not depend on the prompt decided."""

    policy: Policy  # never AUTO
    density: float  # expected share of the feed-forward layers' bytes that a decoded token reads
    predicted_kl: float | None = None  # nats per token; None where it was not measured
    predicted_top1: float | None = None
    score: Score | None = None  # of the statistics wanted of the prompt; None: none
    score_share: float = 1.0
    drafts: ChoicePlan | None = None  # of EXACT, where the model drafts
    setting: Setting | None = None  # how to choose; None: not at all
    counts: torch.Tensor | None = None  # of a core's neurons, int64 [layers]; None: no core
    index: NeuronIndex | None = None

    def choose(self, prompt: PromptStatistics | None) -> Chosen:
        """Raises InvalidRequest of a prompt of one token where its own scores are all there is."""
        setting, counts, policy = self.setting, self.counts, self.policy
        if setting is None:
            return Chosen(ALL_NEURONS, None, None)
        core = held = stable = None
        if counts is not None:
            scores, stable = predict(policy.predictor, policy.score, prompt, counts, self.index)
            members = best_neurons(scores, counts)
            core = core_words(members)
            total = None if prompt is None else prompt.total()
            held = None if total is None or not total.tokens else coverage(total.scores(), members)
        choice = NeuronChoice(core, setting.choice, setting.thresholds, setting.correction)
        return Chosen(choice, held, stable)


class Chooser:
    """Turns policies into choices of neurons, for one backend and one calibrated index, or none."""

    def __init__(
        self, config: ModelShape, info: BackendReads, index: NeuronIndex | None = None
    ) -> None:
        self._layers = config.num_layers
        self._neurons = torch.tensor(config.layer_neurons)
        self._reads, self._index = info.neuron_bytes, index
        self._curves = _curves(index.settings if index else (), info.choices)
        by_token = any(key.kind is PolicyKind.TOKEN for key in self._curves)
        self.policies = (
            PolicyKind.DENSE,
            PolicyKind.CORE,
            *([PolicyKind.TOKEN] if by_token else []),
            PolicyKind.EXACT,
            *([PolicyKind.AUTO] if self._curves else []),
        )

    def plan(self, policy: Policy) -> ChoicePlan:
        """What `policy` comes to here. Raises InvalidRequest of values that cannot work, with field
        "sparsity.…", and SparsityUnavailable of what needs an index or another backend."""
        check_policy(policy, self._layers)
        match policy.kind:
            case PolicyKind.CORE:
                return self._core(policy)
            case PolicyKind.TOKEN:
                return self._token(policy)
            case PolicyKind.EXACT:
                return self._exact(policy)
            case PolicyKind.AUTO:
                return self._auto(policy)
        return ChoicePlan(DENSE, 1.0, predicted_kl=0.0, predicted_top1=1.0)

    def _core(self, policy: Policy) -> ChoicePlan:
        curves = self._found(PolicyKind.CORE)
        if policy.target_kl is not None:
            self._check_predictable(policy)
            if not curves:
                raise self._no_index("sparsity.target_kl", "target_kl")
            return self._reaching(policy, curves, policy.target_kl)
        self._check_predictor(policy)
        density = DEFAULT_CORE_DENSITY if policy.density is None else policy.density
        bounded = policy.first_layer is not None or policy.last_layer is not None
        best = None if bounded else _best(curves, density)
        if best is not None:
            return self._planned(policy, best, known=_is_calibrated(policy))
        shares = self._bounded(policy, density) if bounded else self._sparser(curves, density)
        return self._planned(policy, _unmeasured(density, shares), known=False)

    def _bounded(self, policy: Policy, density: float) -> torch.Tensor:
        """One share for the layers that a policy names, such that all together read `density`."""
        first = policy.first_layer or 0
        last = self._layers if policy.last_layer is None else policy.last_layer
        least = 1 - (last - first) / self._layers
        if density <= least:
            raise InvalidRequest(
                "sparsity.density",
                f"density is {density:g}, and the layers outside {first} .. {last - 1} read {least:.3f} "
                "already; take a higher density, or more layers",
            )
        shares = torch.ones(self._layers)
        shares[first:last] = (density - least) / (1 - least)
        return shares

    def _sparser(self, curves: Mapping[_Key, Curve], density: float) -> torch.Tensor:
        """Shares of a core that reads less than any that was measured."""
        for curve in curves.values():
            shares = curve.settings[0].shares
            assert shares is not None
            return shares * (density / float(shares.mean()))
        return torch.full((self._layers,), density)

    def _token(self, policy: Policy) -> ChoicePlan:
        if not self._found(PolicyKind.TOKEN):
            raise self._no_index("sparsity.policy", "policy token")
        curves = self._found(PolicyKind.TOKEN, policy.choice, policy.core_density)
        if not curves and policy.core_density is not None:
            return self._inside_core(policy)
        if not curves:
            assert policy.choice is not None
            raise SparsityUnavailable(
                "sparsity.choice",
                f"the calibrated index has no choice by {policy.choice.value} for these weights; take "
                f"{' or '.join(sorted(self._token_choices()))}",
            )
        if policy.core_density is not None:
            self._check_predictor(policy)
        if policy.density is None:
            self._check_predictable(policy)
            target = DEFAULT_TARGET_KL if policy.target_kl is None else policy.target_kl
            return self._reaching(policy, curves, target)
        best = _best(curves, policy.density)
        if best is None:
            raise _unreachable(policy.density, min(curve.least for curve in curves.values()))
        return self._planned(policy, best, known=_is_calibrated(policy))

    def _inside_core(self, policy: Policy) -> ChoicePlan:
        """A core whose share nothing was measured of: what is looked at falls by as much, and the tokens'
        thresholds are those of a choice among all neurons that reads so much more."""
        self._check_predictor(policy)
        share = policy.core_density
        assert share is not None
        if policy.target_kl is not None:
            raise SparsityUnavailable(
                "sparsity.core_density",
                f"core_density is {share:g}, and no KL was measured of choosing inside such a core; give a "
                "density, or leave core_density out",
            )
        best = None
        for key, curve in self._found(PolicyKind.TOKEN, policy.choice).items():
            looked, *rest = self._reads[key.choice]
            saved = (1 - share) * looked / (looked + sum(rest))
            density = 1.0 - saved if policy.density is None else policy.density
            if curve.least <= density + saved <= 1:
                best = replace(curve.at(density + saved), density=density)
                break
        if best is None:
            raise InvalidRequest(
                "sparsity.density",
                f"density {policy.density} cannot be reached inside a core of {share:g} of the neurons",
            )
        shares = torch.full((self._layers,), share)
        return self._planned(policy, replace(best, shares=shares), known=False)

    def _exact(self, policy: Policy) -> ChoicePlan:
        draft = policy.draft or DraftKind.NGRAM
        resolved = replace(
            policy, draft=draft, draft_tokens=policy.draft_tokens or DEFAULT_DRAFT_TOKENS[draft]
        )
        exact = ChoicePlan(resolved, 1.0, predicted_kl=0.0, predicted_top1=1.0)
        if draft is DraftKind.NGRAM:
            return exact
        density = DEFAULT_DRAFT_DENSITY if policy.density is None else policy.density
        own = Policy(
            PolicyKind(draft.value),
            density=density,
            choice=policy.choice,
            core_density=policy.core_density,
            predictor=policy.predictor,
            score=policy.score,
            alpha=policy.alpha,
        )
        drafts = self.plan(own)
        return replace(exact, drafts=drafts, score=drafts.score, score_share=drafts.score_share)

    def _auto(self, policy: Policy) -> ChoicePlan:
        if not self._curves:
            raise self._no_index("sparsity.policy", "policy auto")
        self._check_predictable(policy)
        if policy.density is not None:
            best = _best(self._curves, policy.density)
            if best is None:
                least = min(curve.least for curve in self._curves.values())
                raise _unreachable(policy.density, least)
        else:
            target = DEFAULT_TARGET_KL if policy.target_kl is None else policy.target_kl
            best = _cheapest(self._curves, target)
        if best is None or best.density > NEARLY_DENSE:
            return self.plan(DENSE)
        return self._planned(replace(policy, kind=best.kind), best, known=True)

    def _reaching(
        self, policy: Policy, curves: Mapping[_Key, Curve], target_kl: float
    ) -> ChoicePlan:
        best = _cheapest(curves, target_kl)
        return self.plan(DENSE) if best is None else self._planned(policy, best, known=True)

    def _planned(self, policy: Policy, setting: Setting, *, known: bool) -> ChoicePlan:
        """`known`: what was measured of the setting holds for the policy."""
        cored = setting.shares is not None
        share = policy.alpha or DEFAULT_ALPHA.get(policy.score, 1.0)
        density = setting.density
        core = policy.core_density
        if setting.kind is PolicyKind.TOKEN and setting.shares is not None and core is None:
            core = float(setting.shares.mean())
        return ChoicePlan(
            replace(
                policy, density=density, target_kl=None, choice=setting.choice, core_density=core
            ),
            density,
            setting.kl if known else None,
            setting.top1 if known else None,
            policy.score if cored else None,
            share if cored else 1.0,
            setting=setting,
            counts=None if setting.shares is None else neurons_of(setting.shares, self._neurons),
            index=self._index,
        )

    def _found(
        self,
        kind: PolicyKind,
        choice: ChoiceKind | None = None,
        core: float | None = None,
    ) -> dict[_Key, Curve]:
        """Curves of a kind; `choice` None: of any, `core` None: of any core or none."""
        return {
            key: curve
            for key, curve in self._curves.items()
            if key.kind is kind
            and choice in (None, key.choice)
            and (core is None or (key.core and abs(key.core - core) <= SAME_CORE))
        }

    def _token_choices(self) -> set[str]:
        return {key.choice.value for key in self._curves if key.choice is not None}

    def _check_predictor(self, policy: Policy) -> None:
        if policy.predictor is PredictorKind.SIMILARITY and self._index is None:
            raise self._no_index("sparsity.predictor", "predictor similarity")

    def _check_predictable(self, policy: Policy) -> None:
        if not _is_calibrated(policy):
            raise InvalidRequest(
                "sparsity.target_kl",
                "what a choice costs was measured of predictor auto with score norm in all layers; leave "
                "predictor, score and layers out, or give a density of policy core or token",
            )

    def _no_index(self, field: str, what: str) -> SparsityUnavailable:
        if self._index is not None:
            return SparsityUnavailable(
                field, f"{what} needs settings that the calibrated index or the backend has not"
            )
        return SparsityUnavailable(
            field,
            f"{what} needs a calibrated index, and this server has none; make one with `sparserve "
            "calibrate` and serve it with --index",
        )


@dataclass(frozen=True, slots=True)
class _Key:
    """What settings of one curve have in common."""

    kind: PolicyKind
    choice: ChoiceKind | None
    core: float | None  # share of the neurons in a token's core
    corrected: bool


def _curves(settings: Sequence[Setting], choices: AbstractSet[ChoiceKind]) -> dict[_Key, Curve]:
    """Of those settings that a backend with `choices` can follow."""
    grouped: dict[_Key, list[Setting]] = {}
    for own in settings:
        if own.choice is None or own.choice in choices:
            core = None
            if own.kind is PolicyKind.TOKEN and own.shares is not None:
                core = round(float(own.shares.mean()), 2)
            key = _Key(own.kind, own.choice, core, own.correction > 0)
            grouped.setdefault(key, []).append(own)
    return {key: Curve.of(group) for key, group in grouped.items()}


def _best(curves: Mapping[_Key, Curve], density: float) -> Setting | None:
    """The least KL at `density`; None where no curve gets there."""
    reached = [curve.at(density) for curve in curves.values() if curve.least <= density]
    return min(reached, key=lambda own: own.kl, default=None)


def _cheapest(curves: Mapping[_Key, Curve], target_kl: float) -> Setting | None:
    """The least that may be read for `target_kl`; None where no curve gets there below dense."""
    reached = [
        curve.at(density)
        for curve in curves.values()
        if (density := curve.density_for(target_kl)) is not None
    ]
    return min(reached, key=lambda own: own.density, default=None)


def _is_calibrated(policy: Policy) -> bool:
    """Whether the curves hold for it."""
    own = (policy.predictor, policy.score, policy.first_layer, policy.last_layer)
    return own == (DENSE.predictor, DENSE.score, None, None)


def _unmeasured(density: float, shares: torch.Tensor) -> Setting:
    nan = float("nan")
    return Setting(PolicyKind.CORE, density, nan, nan, nan, shares=shares)


def _unreachable(density: float, least: float) -> InvalidRequest:
    return InvalidRequest(
        "sparsity.density",
        f"density is {density:g}; the calibrated index reaches down to {least:.3f}",
    )
