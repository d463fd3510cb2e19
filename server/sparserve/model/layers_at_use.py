"""Layers of a model that are made when they are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

Layer = TypeVar("Layer", covariant=True)


class LayersAtUse(Sequence[Layer]):
    @abstractmethod
    def layer(self, index: int) -> Layer:
        """`index` is in [0, len(self))."""

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Layer]: ...
    def __getitem__(self, index: int | slice) -> Layer | Sequence[Layer]:
        places = range(len(self))[index]
        return (
            self.layer(places) if isinstance(places, int) else [self.layer(own) for own in places]
        )
