"""What compression needs to know of a matrix's inputs: their second moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK_TOKENS = 512  # that are added up in float32, before the rest is in float64


class NonFiniteInputs(ValueError):
    """An input is NaN or infinite; the message names the tensor."""


@dataclass(slots=True, eq=False)
class InputMoments:
    """Sums over the tokens x [width] that went into a matrix: of x x^T, or of x_j^2 alone where width^2
    numbers are too many."""

    sums: torch.Tensor  # float64 [width, width], or [width]: the diagonal
    tokens: int = 0

    @classmethod
    def full(cls, width: int) -> InputMoments:
        """Of no tokens yet; 8 width^2 bytes."""
        return cls(torch.zeros(width, width, dtype=torch.float64))

    @classmethod
    def diagonal(cls, width: int) -> InputMoments:
        """Of no tokens yet; 8 width bytes."""
        return cls(torch.zeros(width, dtype=torch.float64))

    @property
    def width(self) -> int:
        return len(self.sums)

    @property
    def is_diagonal(self) -> bool:
        return self.sums.dim() == 1

    @property
    def squares(self) -> torch.Tensor:
        """The sums of x_j^2, float64 [width]."""
        return self.sums if self.is_diagonal else self.sums.diagonal()

    def add(self, inputs: torch.Tensor, name: str) -> None:
        """Count `inputs` [tokens, width], float32 or bfloat16. The same batches in the same order give the
        same bits. Raises NonFiniteInputs with `name` in the message, and then has counted nothing."""
        if not len(inputs):
            return
        finite = inputs.isfinite().all(dim=1)
        if not bool(finite.all()):
            raise NonFiniteInputs(
                f"inputs of {name} are not finite in {int((~finite).sum())} of {len(inputs)} tokens; "
                "calibrate on text that the model can read, or in a wider data type"
            )
        for block in torch.split(inputs.float(), BLOCK_TOKENS):
            # Squares stay within float32.
            size = float(torch.linalg.vector_norm(block, torch.inf)) or 1.0
            unit = block / size
            own = unit.square_().sum(dim=0) if self.is_diagonal else unit.T @ unit
            self.sums.add_(own, alpha=size * size)
        self.tokens += len(inputs)

    def divided(self, scales: torch.Tensor) -> InputMoments:
        """Those of x / scales [width]."""
        exact = scales.double()
        divisors = exact if self.is_diagonal else exact[:, None]
        return InputMoments(self.sums / divisors / exact, self.tokens)


def nearest_to_outputs(
    weight: torch.Tensor, moments: InputMoments, drift: torch.Tensor, damping: float
) -> torch.Tensor:
    """The V [out, in], float32, that minimizes sum |t - V x|^2 + d |V - W|^2 over inputs x: V makes of them
    what is nearest to the outputs t that `weight` W has of other inputs.

    moments: full, of x. drift: the sum of (t - W x) x^T, float64 [out, in]. d is `damping` times the mean
    diagonal of sum x x^T, and V = W + drift (sum x x^T + d I)^-1.
    """
    second = moments.sums.clone()
    diagonal = second.diagonal()
    # Nothing is known of inputs that were all 0: any d will do.
    diagonal.add_(damping * float(diagonal.mean()) or 1.0)
    change = torch.cholesky_solve(drift.T, torch.linalg.cholesky(second)).T
    return (weight.double() + change).float()
