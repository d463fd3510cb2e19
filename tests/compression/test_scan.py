"""The scan of an LM head: its bounds hold, whatever the input."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_kernels._abi import SK_SCAN_DIRECTIONS
from sparse_kernels.weights import ScanTensors
from sparserve.compression.scan import make_scan, principal_directions


def off_and_bound(scan: ScanTensors, head: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of inputs x [n, hidden]: how far off each product is, and at most may be, [2, n, vocab]."""
    hidden = head.shape[1]
    columns = scan.matrix.codes.shape[1] - SK_SCAN_DIRECTIONS
    weights, basis, x = scan.matrix.dequantize().double(), scan.basis.double(), x.double()
    z = x @ basis.T
    products = x @ weights[:, :hidden].T + z @ weights[:, columns:].T
    along, across = scan.errors.double()
    rest = (x - z @ basis).norm(dim=1)
    bound = z.norm(dim=1)[:, None] * along + rest[:, None] * across
    return torch.stack(((x @ head.double().T - products).abs(), bound))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    hidden=st.sampled_from([48, 64, 100, 192]),
    directions=st.integers(1, 200),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_no_product_is_further_off_than_its_bound(seed, hidden, directions, scale):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    head = (normal(90, hidden) * scale * torch.exp(normal(90, 1))).bfloat16()
    head[7] = 0
    known = normal(directions, hidden) * torch.exp(normal(hidden))
    scan = make_scan(head, known)
    # Rows themselves are inputs that their own errors hit hardest.
    errors = head.double()[:, :hidden] - scan.matrix.dequantize().double()[:, :hidden]
    inputs = torch.cat((known[:20], 30 * normal(20, hidden), head.float(), errors.float()))
    off, bound = off_and_bound(scan, head, inputs)
    assert (off <= bound * (1 + 1e-9) + 1e-12 * scale).all()


def test_bounds_are_tight_for_the_inputs_that_it_was_made_for():
    torch.manual_seed(0)
    head = torch.randn(500, 192).bfloat16()
    mixed = torch.randn(300, 40) @ torch.randn(40, 192)
    other = torch.randn(300, 192) * mixed.norm() / (300 * 192) ** 0.5
    scan = make_scan(head, mixed[:200])
    (_, known), (_, foreign) = (off_and_bound(scan, head, x) for x in (mixed[200:], other))
    assert known.mean() < foreign.mean() / 5


def test_principal_directions_are_those_of_the_finite_inputs():
    torch.manual_seed(0)
    inputs = torch.randn(50, 3) @ torch.randn(3, 96)
    inputs = torch.cat((inputs, torch.full((1, 96), torch.nan)))
    basis = principal_directions(inputs).double()
    assert basis.shape == (SK_SCAN_DIRECTIONS, 96)
    assert not basis[50:].any()  # there are no more inputs
    torch.testing.assert_close(basis[:50] @ basis[:50].T, torch.eye(50).double(), atol=2e-2, rtol=0)
    rest = inputs[:50].double() - inputs[:50].double() @ basis[:3].T @ basis[:3]
    assert rest.norm() < 1e-2 * inputs[:50].norm()


def test_a_head_of_zeros_is_never_off():
    scan = make_scan(torch.zeros(32, 64).bfloat16(), torch.randn(10, 64))
    assert not scan.errors.any()
