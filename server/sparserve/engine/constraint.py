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

    @property
    def is_finished(self) -> bool:
        """Nothing but an end-of-sequence token may follow, or one has been accepted. Raises as
        `allowed` does.
        """
        ...

    def allowed(self) -> npt.NDArray[np.int32] | None:
        """Bit `id % 32` of word `id // 32` is set where the token may come next; None: all may.

        int32 [ceil(vocab_size / 32)]. The array is the matcher's own: the next call overwrites it.
        Not to be called once `is_finished`. Raises InvalidRequest where no token can go on, or where
        following the constraint has become too slow; the choice cannot be continued then.
        """
        ...

    def accept(self, token_id: int) -> None:
        """The token that was generated. Raises ValueError if it was not one of those allowed, and
        InvalidRequest as `allowed` does.
        """
        ...

    def fork(self) -> Matcher:
        """One in the same state that goes on by itself."""
        ...


class CompiledConstraint(Protocol):
    """Shared by requests and threads."""

    def matcher(self) -> Matcher: ...
