"""Policies in words, as `--policies` takes them: core:0.5, core:0.7+token:0.5/planes, kl:0.05."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from sparse_kernels.choice import ChoiceKind, Score
from sparserve.errors import ConfigError
from sparserve.sparsity.policy import DraftKind, Policy, PolicyKind, PredictorKind

# Options that are a word of their own: what they say, by the field of `Policy` that they set.
_WORDS: dict[str, dict[str, Any]] = {
    "choice": {kind.value: kind for kind in ChoiceKind},
    "predictor": {kind.value: kind for kind in PredictorKind},
    "score": {score.value: score for score in Score},
}
_OF_CORE = frozenset({"predictor", "score", "alpha", "layers", "refresh"})
_OF_TOKEN = frozenset({"choice", "refresh"})
_OF_EXACT = frozenset({"draft", "drafts", "choice", "predictor", "score", "alpha"})
_OF_AUTO = frozenset({"refresh"})
_FORMS = "dense, auto, core:0.5, token:0.6, core:0.7+token:0.5, kl:0.05, exact"


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A policy and its words: `PolicySpec.parse(str(spec)) == spec`.

    `dense`, `auto`, `auto:D`, `core:D`, `token:D`, `core:N+token:D` (a token chooses inside a core of the share N of the
    neurons), `kl:K` (auto, for a mean KL of K to dense) or `exact`, `exact:D`; D is the density. Behind them, each
    after a slash: planes, gate (what a token chooses by); stability, similarity, auto (where a core's scores come
    from); norm, count, signed_count (those scores), alpha=A (what a count counts); layers=A-B (the layers, counted
    from 0, both ends included, that have a core; the others are dense); refresh=R; of exact draft=core, token or
    ngram, and drafts=N (tokens drafted at once). CoreInfer as published, of 32 layers:
    core:0.4/stability/signed_count/alpha=0.4/layers=6-26.
    """

    policy: Policy

    @classmethod
    def parse(cls, text: str) -> PolicySpec:
        """Raises ConfigError."""
        head, *options = text.strip().split("/")
        policy, allowed = _head(head, text)
        for option in options:
            name, values = _option(option, text)
            if name not in allowed:
                raise ConfigError(
                    f"policy {text!r}: {head} has no option {option!r}{_has(allowed)}"
                )
            if name in [_option(other, text)[0] for other in options if other is not option]:
                raise ConfigError(f"policy {text!r} says twice what its {name} is")
            policy |= values
        return cls(Policy(**policy))

    def __str__(self) -> str:
        policy, default = self.policy, Policy()
        given = {
            field.name: getattr(policy, field.name)
            for field in fields(policy)
            if getattr(policy, field.name) != getattr(default, field.name)
        }
        words = [_head_words(policy)]
        words += [given[name].value for name in _WORDS if name in given]
        if "alpha" in given:
            words.append(f"alpha={policy.alpha!r}")
        if policy.first_layer is not None and policy.last_layer is not None:
            words.append(f"layers={policy.first_layer}-{policy.last_layer - 1}")
        if policy.refresh_interval:
            words.append(f"refresh={policy.refresh_interval}")
        if policy.draft is not None:
            words.append(f"draft={policy.draft.value}")
        if policy.draft_tokens is not None:
            words.append(f"drafts={policy.draft_tokens}")
        return "/".join(words)


def in_short(policy: Policy) -> str:
    """Its words with a rounded density: of a policy that was picked, not asked for."""
    density = None if policy.density is None else round(policy.density, 3)
    core = None if policy.core_density is None else round(policy.core_density, 3)
    return str(PolicySpec(replace(policy, density=density, core_density=core)))


def parse_policies(text: str) -> list[PolicySpec]:
    """Comma-separated, each once. Raises ConfigError."""
    return list(dict.fromkeys(PolicySpec.parse(part) for part in text.split(",")))


def _head(head: str, text: str) -> tuple[dict[str, Any], frozenset[str]]:
    """(fields of a Policy, the options that may follow)"""
    first, plus, rest = head.partition("+token:")  # not by any plus: 1e+16 is a number
    words = [first, "token:" + rest] if plus else [head]
    cut = (word.partition(":") for word in words)
    match [(name, number if colon else None) for name, colon, number in cut]:
        case [("dense", None)]:
            return {"kind": PolicyKind.DENSE}, frozenset()
        case [("auto", None)]:
            return {"kind": PolicyKind.AUTO}, _OF_AUTO
        case [("auto", str(density))]:
            return {"kind": PolicyKind.AUTO, "density": _density(density, text)}, _OF_AUTO
        case [("kl", str(kl))]:
            target = _number("a KL", kl, text, math.inf)
            return {"kind": PolicyKind.AUTO, "target_kl": target}, _OF_AUTO
        case [("core", str(density))]:
            return {"kind": PolicyKind.CORE, "density": _density(density, text)}, _OF_CORE
        case [("token", str(density))]:
            return {"kind": PolicyKind.TOKEN, "density": _density(density, text)}, _OF_TOKEN
        case [("core", str(core)), ("token", str(density))]:
            both = {"density": _density(density, text), "core_density": _density(core, text)}
            return {"kind": PolicyKind.TOKEN, **both}, _OF_CORE | _OF_TOKEN
        case [("exact", None)]:
            return {"kind": PolicyKind.EXACT}, _OF_EXACT
        case [("exact", str(density))]:
            return {"kind": PolicyKind.EXACT, "density": _density(density, text)}, _OF_EXACT
    raise ConfigError(f"policy {text!r} begins with {head!r}; a policy is one of {_FORMS}")


def _head_words(policy: Policy) -> str:
    match policy.kind:
        case PolicyKind.AUTO if policy.target_kl is not None:
            return f"kl:{policy.target_kl!r}"
        case PolicyKind.TOKEN if policy.core_density is not None:
            return f"core:{policy.core_density!r}+token:{policy.density!r}"
    return (
        policy.kind.value if policy.density is None else f"{policy.kind.value}:{policy.density!r}"
    )


def _option(option: str, text: str) -> tuple[str, dict[str, Any]]:
    """(its name, what it sets in a Policy)"""
    for name, values in _WORDS.items():
        if option in values:
            return name, {name: values[option]}
    name, equals, value = option.partition("=")
    match name:
        case "alpha" if equals:
            return name, {"alpha": _number("alpha", value, text, 1.0)}
        case "layers" if equals:
            first, dash, last = value.partition("-")
            if not dash or _count(first, text, 0) > _count(last, text, 0):
                raise ConfigError(
                    f"policy {text!r}: {option} is no range of layers, as in layers=6-26"
                )
            return name, {"first_layer": int(first), "last_layer": int(last) + 1}
        case "refresh" if equals:
            return name, {"refresh_interval": _count(value, text, 1)}
        case "drafts" if equals:
            return name, {"draft_tokens": _count(value, text, 1)}
        case "draft" if value in [kind.value for kind in DraftKind]:
            return name, {"draft": DraftKind(value)}
    words = ", ".join(word for values in _WORDS.values() for word in values)
    raise ConfigError(
        f"policy {text!r} has no option {option!r}; there are {words}, alpha=0.4, layers=6-26, refresh=16, "
        "draft=core, token or ngram, drafts=4"
    )


def _has(allowed: frozenset[str]) -> str:
    return f"; it has {', '.join(sorted(allowed))}" if allowed else "; it has none"


def _density(value: str, text: str) -> float:
    return _number("a density", value, text, 1.0)


def _number(what: str, value: str, text: str, most: float) -> float:
    """Above 0, finite and not above `most`."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number <= most or math.isinf(number):
        limit = "a number above 0" if math.isinf(most) else f"in (0, {most:g}]"
        raise ConfigError(f"policy {text!r}: {value!r} is not {what}, which is {limit}")
    return number


def _count(value: str, text: str, least: int) -> int:
    if not value.isascii() or not value.isdigit() or int(value) < least:
        raise ConfigError(f"policy {text!r}: {value!r} is no whole number from {least} on")
    return int(value)
