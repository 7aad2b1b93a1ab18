"""Columns against the operations of torch that they stand for."""

import pytest
import torch

from s2ft.layer.columns import add_columns, put_slice, take_slice

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_taken_and_put(dtype: torch.dtype, dim: int, transposed: bool) -> None:
    matrix = torch.randn(7, 5).to(dtype)
    matrix = matrix.T if transposed else matrix
    indices = torch.randperm(matrix.shape[dim])[:3]
    assert torch.equal(take_slice(matrix, dim, indices), matrix.index_select(dim, indices))
    values = torch.randn_like(matrix.index_select(dim, indices))
    expected = matrix.index_copy(dim, indices, values)
    put_slice(matrix, dim, indices, values)
    assert torch.equal(matrix, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9,), (1, 9), (4, 9), (2, 3, 9), (0, 9)])
@pytest.mark.parametrize("kind", ["contiguous", "every other row", "values are a view"])
def test_added(dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> None:
    x, indices = torch.randn(shape).to(dtype), torch.randperm(9)[:4]
    values = torch.randn(*shape[:-1], 8).to(dtype)[..., ::2]
    if kind == "every other row":
        x = torch.stack([x, x], -1)[..., 0]
    if kind != "values are a view":
        values = values.contiguous()
    expected = x.index_add(-1, indices, values)
    assert add_columns(x, indices, values) is x
    assert torch.equal(x, expected)
