"""Which neurons a sequence's tokens use: what sk_choice tells the library."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from enum import Enum

import torch

from sparse_kernels import _abi
from sparse_kernels.native import new_struct

WORD_BITS = 64


class ChoiceKind(Enum):
    """By what a token chooses among the neurons of its core; see `sk_choice_kind`."""

    PLANES = "planes"  # the upper bits of gate and up
    GATE = "gate"


class Score(Enum):
    """What statistics add up of a token's activations; see `sk_score`."""

    NORM = "norm"
    COUNT = "count"
    SIGNED_COUNT = "signed_count"


_KINDS = {
    None: _abi.sk_choice_kind.SK_CHOICE_CORE,
    ChoiceKind.PLANES: _abi.sk_choice_kind.SK_CHOICE_PLANES,
    ChoiceKind.GATE: _abi.sk_choice_kind.SK_CHOICE_GATE,
}
SCORES = {
    Score.NORM: _abi.sk_score.SK_SCORE_NORM,
    Score.COUNT: _abi.sk_score.SK_SCORE_COUNT,
    Score.SIGNED_COUNT: _abi.sk_score.SK_SCORE_SIGNED_COUNT,
}


@dataclass(frozen=True, slots=True, eq=False)
class NeuronChoice:
    """Which neurons of each layer the tokens of a sequence use; the others' activations count as zero.

    Made once, used in many steps. Where `kind` is None all neurons of the core are used, else those whose
    importance is not below the layer's first threshold; see sk_choice in include/sparse_kernels.h.
    Raises ValueError of a tensor of another shape or type.
    """

    core: torch.Tensor | None = (
        None  # int64 [layers, words] of 64 bits, see `core_words`; None: all
    )
    kind: ChoiceKind | None = None
    thresholds: torch.Tensor | None = None  # float32 [layers, 3]; None without `kind`
    correction: int = 0  # the number of one of the model's corrections, from 1; 0: none
    struct: _abi.sk_choice = field(init=False, repr=False)

    def __post_init__(self) -> None:
        core, thresholds = self.core, self.thresholds
        if core is not None and (
            core.dtype != torch.int64 or core.dim() != 2 or not core.is_contiguous()
        ):
            raise ValueError(
                f"core is {core.dtype} {list(core.shape)}; expected torch.int64 [layers, words]"
            )
        if (thresholds is None) != (self.kind is None):
            raise ValueError("a choice by importance has thresholds, one without has none")
        if thresholds is not None and (
            thresholds.dtype != torch.float32
            or thresholds.dim() != 2
            or thresholds.shape[1] != 3
            or not thresholds.is_contiguous()
        ):
            raise ValueError(
                f"thresholds are {thresholds.dtype} {list(thresholds.shape)}; expected "
                "torch.float32 [layers, 3]"
            )
        struct = new_struct(_abi.sk_choice)
        struct.kind, struct.correction = _KINDS[self.kind], self.correction
        if core is not None:
            struct.core = ctypes.cast(core.data_ptr(), ctypes.POINTER(ctypes.c_uint64))
            struct.core_count = core.numel()
        if thresholds is not None:
            struct.thresholds = ctypes.cast(thresholds.data_ptr(), ctypes.POINTER(ctypes.c_float))
            struct.thresholds_count = thresholds.numel()
        object.__setattr__(self, "struct", struct)

    @property
    def is_dense(self) -> bool:
        """Whether every neuron is used, by nothing but its absence of limits."""
        return self.core is None and self.kind is None and not self.correction

    def members(self, neurons: int) -> torch.Tensor | None:
        """The core as bool [layers, neurons]; None: all."""
        return None if self.core is None else core_members(self.core, neurons)


ALL_NEURONS = NeuronChoice()


def core_words(members: torch.Tensor) -> torch.Tensor:
    """bool [layers, neurons] -> int64 [layers, words]: bit n % 64 of word n / 64 is neuron n."""
    missing = -members.shape[1] % WORD_BITS
    padded = torch.nn.functional.pad(members, (0, missing)).view(len(members), -1, WORD_BITS)
    bits = torch.arange(WORD_BITS)
    # The 64th bit is the sign's: the sum runs over it as any other, modulo 2^64.
    return (padded.long() << bits).sum(dim=2)


def core_members(words: torch.Tensor, neurons: int) -> torch.Tensor:
    """int64 [layers, words] -> bool [layers, neurons]."""
    bits = torch.arange(WORD_BITS)
    return (words[..., None] >> bits & 1).bool().flatten(1)[:, :neurons]
