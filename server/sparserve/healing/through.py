"""What a policy leaves of activations, as a student sees it while it learns."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from sparserve.healing.network import Network, Neurons
from sparserve.model.config import ModelConfig
from sparserve.sparsity.core import neurons_of


class Through:
    """Dense: all that a layer's neurons make; a `Used` of a network. Others change what follows a prompt, which is
    read dense."""

    def attach(self, network: Network) -> None:
        """The student, before the first pass."""

    def renew(self) -> None:
        """Forget what was seen of the student's weights: a run that goes on from here has seen nothing either."""

    def begin(self, prompt_tokens: int, *, watch: bool) -> None:
        """A forward pass of sequences whose first `prompt_tokens` are a prompt; `spread` is asked for if `watch`."""
        self._prompt_tokens, self._watches = prompt_tokens, watch
        self._spreads: list[torch.Tensor] = []

    def prompt_tokens(self, window: int, source: random.Random | None) -> int:
        """Of a window: drawn from `source`, or those of the held-out ones."""
        return 0

    def __call__(self, layer: int, made: Neurons) -> torch.Tensor:
        """-> what down gets, [batch, tokens, neurons]."""
        if self._watches:
            self._spreads.append(_spread(made.activations[:, self._prompt_tokens :]))
        return self._used(layer, made)

    def spread(self) -> torch.Tensor:
        """Of this pass: how evenly activations are spread over the neurons, from 0 to 1, mean over tokens and layers."""
        return torch.stack(self._spreads).mean()

    def _used(self, layer: int, made: Neurons) -> torch.Tensor:
        return made.activations


class Core(Through):
    """Of each layer the `counts` best neurons by the prompt's norm scores, as `PredictorKind.STABILITY`."""

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = counts

    def prompt_tokens(self, window: int, source: random.Random | None) -> int:
        if source is None:
            return window // 2
        return source.randint(max(2, window // 4), max(2, window * 5 // 8))

    @torch.no_grad()
    def _mask(self, layer: int, activations: torch.Tensor) -> torch.Tensor:
        first = self._prompt_tokens
        # The first token, an attention sink, counts nowhere.
        squares = activations[:, 1:first].float().square()
        scores = (squares / squares.sum(dim=2, keepdim=True).clamp(min=1e-30)).sum(dim=1)
        best = scores.topk(self._counts[layer], dim=1).indices
        members = torch.zeros_like(scores, dtype=activations.dtype).scatter_(1, best, 1)
        mask = torch.ones_like(activations)
        mask[:, first:] = members[:, None]
        return mask

    def _used(self, layer: int, made: Neurons) -> torch.Tensor:
        return made.activations * self._mask(layer, made.activations)


def _spread(activations: torch.Tensor) -> torch.Tensor:
    """|a|_1 / (sqrt(n) |a|_2), which does not fall by making all of a smaller (Hoyer 2004); what ProSparse (arXiv
    2402.13516) does by |a|_1."""
    own = activations.float()
    return (own.abs().mean(dim=-1) / own.square().mean(dim=-1).sqrt().clamp(min=1e-20)).mean()


def core_of(share: float, config: ModelConfig) -> Core:
    neurons = torch.tensor(config.layer_neurons)
    return Core(neurons_of(torch.full(neurons.shape, share), neurons).tolist())
