"""Structured output: what the text must look like, and which tokens keep it so."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt


class ConstraintKind(Enum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"
    CHOICE = "choice"
    JSON_OBJECT = "json_object"


@dataclass(frozen=True, slots=True)
class Constraint:
    """`source` is the schema, the regex, the grammar, a JSON array of the choices, or empty."""

    kind: ConstraintKind
    source: str = ""


class Matcher(Protocol):
    """Follows the output of one choice; only the engine thread touches it."""

    def allowed(self) -> npt.NDArray[np.int32] | None:
        """Bit `id % 32` of word `id // 32` is set where the token may come next; None: all may."""
        ...

    @property
    def is_finished(self) -> bool:
        """The text fits, and nothing but the end may follow."""
        ...

    def accept(self, token_id: int) -> None:
        """The token that was generated, one of those allowed."""
        ...


class CompiledConstraint(Protocol):
    """Shared by requests and threads."""

    def matcher(self) -> Matcher: ...
