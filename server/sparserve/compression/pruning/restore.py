"""What a bias and a matrix's other inputs can make up for, once some inputs are removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

RIDGE = 0.01  # times the mean variance of an input


@dataclass(frozen=True, slots=True, eq=False)
class Restored:
    """The nearest of all that was tried, leaving the matrix as it is among it, by errors on held-out text."""

    weight: torch.Tensor | None  # float32 [out, kept]; None: as it was
    bias: torch.Tensor | None  # float32 [out], to be added; None: none
    # Squared errors of the outputs on held-out text, relative to them, without restoring and with it.
    removed: float
    restored: float


def restore(
    weight: torch.Tensor,
    kept: torch.Tensor,
    fitted: torch.Tensor,
    held_out: torch.Tensor,
    how: Literal["bias", "least_squares"],
) -> Restored:
    """Of `weight` W [out, in], whose inputs at `kept` (int64) stay: V [out, kept] and b [out] that make of them
    about what W makes of all.

    `fitted` and `held_out` are sums of y y^T, float64 [in + 1, in + 1], of the text that V and b are worked out on
    and of that which decides; y are a token's inputs and a 1 behind them, times what the token is to weigh. `bias` is
    FLAP's (arXiv 2312.11983): V = W[:, kept], and what is removed is replaced by its mean. `least_squares` tries that too.
    """
    exact, plain = weight.double(), weight[:, kept]
    mean = fitted[-1, :-1] / fitted[-1, -1]
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[kept] = False
    tried = [(plain, torch.zeros(len(weight)))]
    tried.append((plain, (exact[:, gone] @ mean[gone]).float()))
    if how == "least_squares":
        refitted = _least_squares(exact, kept, fitted, mean)
        tried.append((refitted, (exact @ mean - refitted.double() @ mean[kept]).float()))
    errors = [_error(exact, kept, *own, held_out) for own in tried]
    best = errors.index(min(errors))
    return Restored(
        tried[best][0] if best == 2 else None,
        tried[best][1] if best else None,
        errors[0],
        errors[best],
    )


def _least_squares(
    exact: torch.Tensor, kept: torch.Tensor, fitted: torch.Tensor, mean: torch.Tensor
) -> torch.Tensor:
    """The V that minimizes E |W (x - mean) - V (x - mean)[K]|^2 + ridge |W[:, K] - V|^2, float32 [out, kept], from the
    inputs' covariance C: V = (W C[:, K] + ridge W[:, K]) (C[K, K] + ridge)^-1."""
    covariance = (fitted[:-1, :-1] / fitted[-1, -1]).addr_(mean, mean, alpha=-1)
    own = covariance[kept][:, kept]
    # Nothing is known of inputs that never change: any ridge will do.
    ridge = RIDGE * float(covariance.diagonal().mean()) or 1.0
    own.diagonal().add_(ridge)
    target = exact @ covariance[:, kept] + ridge * exact[:, kept]
    return torch.cholesky_solve(target.T, torch.linalg.cholesky(own)).T.float()


def _error(
    exact: torch.Tensor,
    kept: torch.Tensor,
    served: torch.Tensor,
    bias: torch.Tensor,
    held_out: torch.Tensor,
) -> float:
    """The squared error of served x[kept] + bias, relative to what `exact` x is."""
    missing = torch.cat((exact, -bias.double()[:, None]), dim=1)
    missing[:, kept] -= served.double()
    wrong = missing.any(dim=0)  # few, where the matrix is as it was
    lost = _square(missing[:, wrong], held_out[wrong][:, wrong])
    whole = _square(exact, held_out[:-1, :-1])
    return lost / whole if whole > 0 else 0.0


def _square(matrix: torch.Tensor, moments: torch.Tensor) -> float:
    """The sum of |matrix y|^2."""
    return float((matrix @ moments).mul_(matrix).sum())
