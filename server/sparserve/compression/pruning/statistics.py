"""What the heads and neurons of a layer do on a calibration text."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True, eq=False)
class InputStatistics:
    """Sums over windows of means over their tokens, for each input of a matrix; float64 [inputs].

    Windows count alike, however long: AMP (arXiv 2504.21174) takes means over prompts. First tokens are counted:
    what an attention sink needs must stay.
    """

    absolute: torch.Tensor
    values: torch.Tensor
    squares: torch.Tensor
    windows: int = 0

    @classmethod
    def zeros(cls, inputs: int) -> InputStatistics:
        absolute, values, squares = torch.zeros(3, inputs, dtype=torch.float64)
        return cls(absolute, values, squares)

    def add(self, inputs: torch.Tensor) -> None:
        """One window's, [tokens, inputs]."""
        exact = inputs.double()
        self.absolute += exact.abs().mean(dim=0)
        self.values += exact.mean(dim=0)
        self.squares += exact.square().mean(dim=0)
        self.windows += 1

    @property
    def mean_absolute(self) -> torch.Tensor:
        return self.absolute / self.windows

    @property
    def mean_square(self) -> torch.Tensor:
        return self.squares / self.windows

    @property
    def variance(self) -> torch.Tensor:
        return (self.mean_square - (self.values / self.windows).square()).clamp(min=0)


@dataclass(slots=True, eq=False)
class LayerStatistics:
    heads: InputStatistics  # of the output projection, [num_heads * head_dim]
    neurons: InputStatistics  # of down
    # Sum over windows of the mean over tokens of |W_o z|_1, for each head's own part z; float64 [num_heads].
    head_outputs: torch.Tensor

    @classmethod
    def zeros(cls, num_heads: int, head_dim: int, neurons: int) -> LayerStatistics:
        return cls(
            InputStatistics.zeros(num_heads * head_dim),
            InputStatistics.zeros(neurons),
            torch.zeros(num_heads, dtype=torch.float64),
        )

    def add_heads(self, inputs: torch.Tensor, output: torch.Tensor) -> None:
        """One window's inputs [tokens, num_heads * head_dim] of the output projection [hidden, the same]."""
        self.heads.add(inputs)
        count = len(self.head_outputs)
        own = inputs.view(len(inputs), count, -1)
        parts = output.view(len(output), count, -1)
        for head in range(count):  # all at once would be [tokens, num_heads, hidden]
            through = own[:, head] @ parts[:, head].T
            self.head_outputs[head] += through.abs().sum(dim=1).double().mean()

    @property
    def mean_head_outputs(self) -> torch.Tensor:
        return self.head_outputs / self.heads.windows
