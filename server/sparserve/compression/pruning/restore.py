"""What a matrix's other inputs can make up for, once some are removed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

RIDGE = 0.01  # times the mean square of an input


@dataclass(frozen=True, slots=True, eq=False)
class Restored:
    weight: torch.Tensor  # float32 [out, kept]
    removed: float  # relative squared error of the outputs on held-out text, without restoring
    restored: float  # with it


def least_squares(
    weight: torch.Tensor, kept: torch.Tensor, fitted: torch.Tensor, held_out: torch.Tensor
) -> Restored:
    """The V [out, kept] nearest to `weight` [out, in] in what it makes of its inputs: V = W C[:, K] (C[K, K] +
    ridge)^-1, with C = sum x x^T float64 [in, in] of the text that it is `fitted` on. Whoever asks decides by the
    errors on the `held_out` text; `kept` are the places of the inputs that stay, int64 [kept].
    """
    exact = weight.double()
    own = fitted[kept][:, kept].clone()
    own.diagonal().add_(RIDGE * float(fitted.diagonal().mean()) or 1.0)
    target = exact @ fitted[:, kept]
    solved = torch.cholesky_solve(target.T, torch.linalg.cholesky(own)).T.float()

    def error(served: torch.Tensor) -> float:
        missing = exact.clone()
        missing[:, kept] -= served.double()
        lost = torch.einsum("oi,ij,oj->", missing, held_out, missing)
        whole = torch.einsum("oi,ij,oj->", exact, held_out, exact)
        return float(lost / whole) if whole > 0 else 0.0

    return Restored(solved, error(weight[:, kept]), error(solved))
