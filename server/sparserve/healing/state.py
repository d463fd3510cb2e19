"""How far a run has come, kept in a file, so that an interrupted one goes on to the same result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from sparserve.errors import ConfigError
from sparserve.sparsity.index import save_whole

METADATA_KEY = "sparserve_healing"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Look:
    """At the held-out windows."""

    step: int
    training: float | None  # mean KL of the steps since the last look; None before the first step
    held_out: float  # mean KL, nats per token
    spread: float  # of activations, see `through.Through`
    objective: float  # what the run makes small: the KL and, as far as it weighs, the spread


@dataclass(slots=True, eq=False)
class State:
    """After `step` steps."""

    step: int = 0
    looks: list[Look] = field(default_factory=list)
    parameters: Tensors = field(default_factory=dict)
    moments: Tensors = field(default_factory=dict)  # of the optimizer, "<name>/<moment>"
    best: Tensors = field(default_factory=dict)  # parameters at the best look

    @property
    def best_look(self) -> Look:
        return min(self.looks, key=lambda own: own.objective)


class StateFile:
    """A safetensors file; one of other inputs, or one that cannot be read, counts as none."""

    def __init__(self, path: Path, inputs: Mapping[str, Any]) -> None:
        """`inputs`: JSON values of all that results depend on."""
        self._path, self._inputs = path, json.loads(json.dumps(inputs))

    def is_of_another_run(self) -> bool:
        """Whether there is one, and `load` finds none in it."""
        return self._path.exists() and self.load() is None

    def load(self) -> State | None:
        try:
            with safe_open(self._path, framework="pt") as file:
                told = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
                if told.get("inputs") != self._inputs:
                    return None
                parts: dict[str, Tensors] = {"parameters": {}, "moments": {}, "best": {}}
                for name in file.keys():  # noqa: SIM118
                    part, _, own = name.partition("/")
                    parts[part][own] = file.get_tensor(name)
                looks = TypeAdapter(list[Look]).validate_python(told["looks"])
                return State(int(told["step"]), looks, **parts)
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError, ValidationError):
            return None

    def save(self, state: State) -> None:
        """Raises ConfigError."""
        told = {
            "inputs": self._inputs,
            "step": state.step,
            "looks": [asdict(own) for own in state.looks],
        }
        tensors = {
            f"{part}/{name}": tensor
            for part in ("parameters", "moments", "best")
            for name, tensor in getattr(state, part).items()
        }
        try:
            save_whole(self._path, tensors, {METADATA_KEY: json.dumps(told)})
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be written: {error}") from error

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)
