"""Low-rank compensation of what rounding took: W x is about Q x + B (A x).

Of E = W - Q [out, in], with singular values in E S = U Sigma V^T for some S [in, in]:

    B = U_r Sigma_r^(1/2),    A = Sigma_r^(1/2) V_r^T S^-1 = Sigma_r^(-1/2) U_r^T E

minimizes |(E - B A) S|^2, which is E|(E - B A) x|^2 where S S^T = R = E[x x^T]. The second form of A needs
no inverse, so inputs that calibration never saw do no harm: what is left of E is E less its projection
onto U_r.

    S          name
    I          LoRC: Yao et al., "ZeroQuant-V2", arXiv 2303.08302
    diag(R)^½  QERA-approx: Zhang et al., "QERA: an Analytical Framework for Quantization Error
               Reconstruction", arXiv 2410.06040; the best where inputs do not correlate
    R^½        QERA-exact, the same paper: the best there is
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparse_kernels.weights import FACTOR_ZERO, Factors
from sparserve.compression.quantize import divisors, group_scales
from sparserve.compression.statistics import InputMoments

FACTOR_CODES = 256


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """B A: outputs [out, rank] and inputs [rank, in], float32."""

    outputs: torch.Tensor
    inputs: torch.Tensor

    @property
    def transposed(self) -> LowRank:
        """Of the transposed matrix, as down is stored: its neurons have rows of `outputs`."""
        return LowRank(self.inputs.T.contiguous(), self.outputs.T.contiguous())


@dataclass(frozen=True, slots=True, eq=False)
class Decomposition:
    """E S for all ranks up to some; factors are cut from it."""

    # float64 [most], falling. Each that is kept lowers the mean of |(E - B A) x|^2 by its square; with LoRC
    # that is |E - B A|^2.
    singular_values: torch.Tensor
    outputs: torch.Tensor  # float32 [out, most]
    inputs: torch.Tensor  # float32 [most, in]

    def factors(self, rank: int) -> LowRank:
        """The best of this rank. Raises ValueError."""
        most = len(self.singular_values)
        if not 0 <= rank <= most:
            raise ValueError(f"rank is {rank}; of this decomposition it can be 0 to {most}")
        return LowRank(self.outputs[:, :rank].contiguous(), self.inputs[:rank].contiguous())


def lorc(error: torch.Tensor, most: int) -> Decomposition:
    """`error` [out, in], W - Q, decomposed up to rank `most`, or up to its lesser side. Matrices that share
    their inputs can be stacked by rows and then share A."""
    return _decompose(error, torch.ones(error.shape[1], dtype=torch.float64), most)


def qera(error: torch.Tensor, moments: InputMoments, most: int) -> Decomposition:
    """As `lorc`, for the inputs that `moments` are of: QERA-exact by full ones, else QERA-approx. Raises
    ValueError of moments that cannot be of these inputs."""
    if moments.width != error.shape[1] or not moments.tokens:
        raise ValueError(
            f"moments of {moments.width} inputs and {moments.tokens} tokens for an error of "
            f"{error.shape[1]} inputs; they must be of as many, and of at least 1 token"
        )
    return _decompose(error, moments.sums / moments.tokens, most)


def _decompose(error: torch.Tensor, second: torch.Tensor, most: int) -> Decomposition:
    """second: R, float64 [in, in], or [in] if it is diagonal.

    By the lesser of two Gram matrices, E R E^T or S^T E^T E S, in a third of the time of an SVD. That leaves
    singular values below 1e-8 of the first inexact, hence the limit; a QR makes U orthonormal all the same.
    """
    exact = error.double()
    out, width = exact.shape
    if out <= width:
        squares, vectors = torch.linalg.eigh(_weighted(exact, second) @ exact.T)
        left = vectors.flip(1)[:, :most]
    else:
        weighted = _weighted(exact, _root(second))
        squares, vectors = torch.linalg.eigh(weighted.T @ weighted)
        left = torch.linalg.qr(weighted @ vectors.flip(1)[:, :most]).Q
    singular = squares.flip(0)[:most].clamp_(min=0).sqrt_()
    # Directions without error get no factors.
    limit = len(squares) * torch.finfo(torch.float32).eps * singular[:1]
    roots = singular.sqrt().masked_fill_(singular <= limit, 0)
    inverses = roots.reciprocal().masked_fill_(roots == 0, 0)
    inputs = inverses[:, None] * (left.T @ exact)
    return Decomposition(singular, (left * roots).float(), inputs.float())


def _weighted(matrix: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return matrix * second if second.dim() == 1 else matrix @ second


def _root(second: torch.Tensor) -> torch.Tensor:
    """S with S S^T = R: any will do. Where R is not diagonal, its eigenvectors times roots."""
    if second.dim() == 1:
        return second.sqrt()
    values, vectors = torch.linalg.eigh(second)
    root: torch.Tensor = vectors * values.clamp_(min=0).sqrt_()
    return root


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedLowRank:
    """B in integers, A in bfloat16: outputs = scale of the row * (code - FACTOR_ZERO)."""

    codes: torch.Tensor  # uint8 [out, rank]
    scales: torch.Tensor  # float16 [out]; 0 for a row of zeros
    inputs: torch.Tensor  # bfloat16 [rank, in]

    @property
    def factors(self) -> Factors:
        """B as matrices have it."""
        return Factors(self.codes, self.scales)

    def dequantize(self) -> LowRank:
        """Exact."""
        return LowRank(self.factors.dequantize(), self.inputs.float())


def quantize_factors(factors: LowRank, largest_scale: float = 1.0) -> QuantizedLowRank:
    """Round B to 8 bits, a scale to a row, and A to bfloat16.

    Codes are 0 to 255, so a row reaches from -136 to 119 scales. A power of two goes from A to B or back,
    so that the largest scale is about `largest_scale`; by default those of rows 10^4 times smaller are
    then still normal in float16.
    """
    # With a 0 in each row, for there may be no ranks, and a scale must reach 0.
    padded = F.pad(factors.outputs.double(), (0, 1))
    largest = float(padded.abs().max())
    levels = math.log2(largest / (FACTOR_ZERO * largest_scale)) if largest else 0.0
    shift = 2.0 ** -round(levels)
    outputs = padded * shift
    least, greatest = outputs.aminmax(dim=1)
    need = torch.maximum(greatest / (FACTOR_CODES - 1 - FACTOR_ZERO), -least / FACTOR_ZERO)
    scales = group_scales(torch.zeros_like(need), need, 1)
    codes = (outputs[:, :-1] / divisors(scales).double()[:, None]).round_().add_(FACTOR_ZERO)
    return QuantizedLowRank(
        codes.to(torch.uint8), scales, (factors.inputs.double() / shift).bfloat16()
    )
