"""What a layer's inputs are like: correlated, and of very different sizes."""

from collections.abc import Callable

import pytest
import torch

from sparserve.compression.statistics import InputMoments

Moments = Callable[[torch.Tensor], InputMoments]


@pytest.fixture(scope="session")
def inputs_like() -> Callable[..., torch.Tensor]:
    """(tokens, width, seed=0, sources=width) -> float32 [tokens, width], mixed of that many sources."""

    def make(tokens: int, width: int, seed: int = 0, sources: int | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        count = sources or width
        sizes = torch.arange(1, count + 1).float() ** -0.7
        return (normal(tokens, count) * sizes) @ normal(count, width) * normal(width).exp()

    return make


@pytest.fixture(scope="session")
def moments_of() -> Moments:
    def make(inputs: torch.Tensor) -> InputMoments:
        exact = inputs.double()
        return InputMoments(exact.T @ exact, len(inputs))

    return make


@pytest.fixture(scope="session")
def diagonal_of() -> Moments:
    def make(inputs: torch.Tensor) -> InputMoments:
        return InputMoments(inputs.double().square().sum(dim=0), len(inputs))

    return make
