"""Grouped products against one product for each group."""

import pytest
import torch

from s2ft.layer.grouped import grouped_outer, grouped_product

SIZES = {"aligned": (8, 16), "odd": (5, 3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_each_group_has_its_own_matrix(dtype: torch.dtype, sizes: str) -> None:
    inputs, outputs = SIZES[sizes]
    counts = [3, 0, 1, 6, 0]
    ends = torch.tensor(counts).cumsum(0).int()
    x = torch.randn(sum(counts), inputs, dtype=dtype, requires_grad=True)
    weights = torch.randn(len(counts), inputs, outputs, dtype=dtype, requires_grad=True)
    grad = torch.randn(sum(counts), outputs, dtype=dtype)
    y = grouped_product(x, weights, ends)
    parts = [rows @ matrix for rows, matrix in zip(x.double().split(counts), weights.double(), strict=True)]
    expected = torch.cat(parts)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    found = torch.autograd.grad(y, (x, weights), grad)
    wanted = torch.autograd.grad(expected, (x, weights), grad.double())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=2 * tolerance, atol=2 * tolerance)
    torch.testing.assert_close(grouped_outer(x, grad, ends), found[1], rtol=tolerance, atol=tolerance)


def test_no_rows_at_all() -> None:
    ends = torch.zeros(2, dtype=torch.int32)
    for dtype in (torch.float32, torch.float64):
        x, weights = torch.ones(0, 8, dtype=dtype), torch.ones(2, 8, 8, dtype=dtype)
        assert grouped_product(x, weights, ends).shape == (0, 8)
        assert grouped_outer(x, x, ends).equal(torch.zeros(2, 8, 8, dtype=dtype))
