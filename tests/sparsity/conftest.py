"""A small model's shape, statistics made of given scores, and an index made of plain numbers."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from sparse_kernels.choice import ChoiceKind
from sparserve.sparsity.chooser import Chooser
from sparserve.sparsity.index import IndexKey, NeuronIndex, Setting
from sparserve.sparsity.policy import PolicyKind
from sparserve.sparsity.statistics import NeuronStatistics, PromptStatistics

LAYERS, NEURONS, HIDDEN = 4, 100, 16
GATE, PLANES = ChoiceKind.GATE, ChoiceKind.PLANES


@dataclass(frozen=True)
class Shape:
    num_layers: int = LAYERS
    layer_neurons: tuple[int, ...] = (NEURONS,) * LAYERS


@dataclass(frozen=True)
class Reads:
    choices: frozenset = frozenset({GATE, PLANES})
    neuron_bytes: dict = field(
        default_factory=lambda: {
            None: (10.0, 20.0, 0.0, 0.0),
            GATE: (10.0, 20.0, 0.0, 0.0),
            PLANES: (10.0, 5.0, 10.0, 5.0),
        }
    )


@pytest.fixture(scope="session")
def shape() -> Shape:
    return Shape()


@pytest.fixture(scope="session")
def reads() -> Reads:
    return Reads()


@pytest.fixture
def chooser(shape: Shape, reads: Reads) -> Chooser:
    """Without an index."""
    return Chooser(shape, reads)


@pytest.fixture(scope="session")
def statistics() -> Callable[..., PromptStatistics]:
    """`statistics(scores, tokens=200)`: of a prompt all of whose tokens but the first score alike."""

    def make(scores: torch.Tensor, tokens: int = 200) -> PromptStatistics:
        prompt = PromptStatistics(16)
        for first in range(0, tokens, 16):
            counted = min(16, tokens - first) - (first == 0)
            sums = (scores.double() * counted * 2**32).long()
            prompt.extend(first, [NeuronStatistics(sums, counted)])
        return prompt

    return make


@pytest.fixture(scope="session")
def falling() -> torch.Tensor:
    """Scores that fall with the neuron's number, [LAYERS, NEURONS]."""
    return torch.linspace(1, 0.01, NEURONS).expand(LAYERS, NEURONS) / NEURONS


def setting(kind: PolicyKind, density: float, kl: float, choice: ChoiceKind | None = None,
            core: float | None = None, correction: int = 0) -> Setting:  # fmt: skip
    """Of a choice by token: thresholds of 1 - density, twice and four times that."""
    shares = thresholds = None
    if kind is PolicyKind.CORE:
        core = density
    if core is not None:
        shares = torch.full((LAYERS,), core)
    if choice is not None:
        thresholds = torch.full((LAYERS, 1), 1 - density) * torch.tensor([1.0, 2.0, 4.0])
    return Setting(kind, density, kl, 2 * kl, 1 - kl, choice, shares,
                   thresholds, correction)  # fmt: skip


@pytest.fixture(scope="session")
def key() -> IndexKey:
    return IndexKey("tiny", "ab" * 32, "cd" * 32, "int8", LAYERS, NEURONS, HIDDEN)


@pytest.fixture(scope="session")
def index(key: IndexKey) -> NeuronIndex:
    """Two clusters of prompts: one uses the first neurons, one the last; a prior for those in the middle."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.linspace(1, 0, NEURONS) ** 8 / 10
    clusters = torch.stack((steps, steps.flip(0)))
    middle = 1 - (torch.arange(NEURONS) - 49.5).abs() / 100
    core, token = PolicyKind.CORE, PolicyKind.TOKEN
    pairs = [
        tuple(torch.randn(2, 3, HIDDEN, generator=generator).bfloat16()) for _ in range(LAYERS)
    ]
    return NeuronIndex(
        key=key,
        prior=middle.expand(LAYERS, NEURONS).contiguous(),
        cluster_layer=3,
        centroids=torch.nn.functional.normalize(clusters.sqrt(), dim=1),
        clusters=clusters[:, None].expand(2, LAYERS, NEURONS).half(),
        settings=[
            setting(core, 0.3, 1.0), setting(core, 0.5, 0.5), setting(core, 0.8, 0.1),
            setting(core, 0.55, 0.3, correction=1),
            setting(token, 0.45, 0.3, PLANES), setting(token, 0.6, 0.04, PLANES),
            setting(token, 0.8, 0.01, PLANES),
            setting(token, 0.5, 0.4, GATE), setting(token, 0.8, 0.05, GATE),
            setting(token, 0.4, 0.35, PLANES, core=0.7), setting(token, 0.5, 0.2, PLANES, core=0.7),
        ],
        planes_factors=torch.rand(LAYERS, NEURONS, generator=generator),
        gate_factors=torch.rand(LAYERS, NEURONS, generator=generator),
        corrections=[pairs],
        source={"text": "ef" * 32},
    )  # fmt: skip


@pytest.fixture
def calibrated(shape: Shape, reads: Reads, index: NeuronIndex) -> Chooser:
    return Chooser(shape, reads, index)
