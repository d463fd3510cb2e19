"""How a request chooses the neurons that its decode steps read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class PolicyKind(Enum):
    DENSE = "dense"
    CORE = "core"
    TOKEN = "token"
    EXACT = "exact"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Policy:
    """A request's choice. What a step then reads may depend on the prompt too; see `Provenance`."""

    kind: PolicyKind = PolicyKind.DENSE
    density: float = 1.0  # share of neurons read in decode, (0, 1]


DENSE = Policy()
