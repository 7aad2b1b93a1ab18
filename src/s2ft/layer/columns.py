"""Some rows or columns of a matrix: taken, put and added, by whichever operation of torch is fastest where they lie.

columns on a CPU    `gather` and `scatter_` of integers of the same size: faster than `index_select` and `index_copy_`, and in
                    half precision than `index_add_`
all else            `index_select`, `index_copy_`, `index_add_`
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2ft.format.slices import put, take

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def add_delta(base: Tensor, delta: Tensor) -> Tensor:
    """The sum in the dtype of `base`, computed in float32 at least and rounded once.

    Example:
        >>> add_delta(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0**-8 + 2.0**-20])).item()  # 1 + 2**-7
        1.0078125
    """
    return (base + delta).to(base.dtype)  # two tensors of half precision, too, torch adds in float32


def take_slice(
    matrix: Tensor,  # [rows, columns], or [experts, rows, columns]
    dim: int,
    indices: Tensor,  # [s], int64
) -> Tensor:  # [rows, s] for dim 1, [s, columns] for dim 0
    """The values of rows or columns, as a copy."""
    if not lies_in_columns(matrix, dim):
        return take(matrix, dim, indices)
    bits = _INTEGERS[matrix.itemsize]
    return matrix.view(bits).gather(dim, _every_entry(matrix, dim, indices)).view(matrix.dtype)


def take_columns(matrix: Tensor, indices: Tensor, into: Tensor) -> None:
    """`take_slice` for dim 1, where `lies_in_columns`, into a part of a tensor of that dtype, [rows, s]."""
    bits = _INTEGERS[matrix.itemsize]
    torch.gather(matrix.view(bits), 1, _every_entry(matrix, 1, indices), out=into.view(bits))


def put_slice(
    matrix: Tensor,  # [rows, columns], or [experts, rows, columns]
    dim: int,
    indices: Tensor,  # [s], int64
    values: Tensor,  # [rows, s] for dim 1, [s, columns] for dim 0
) -> None:
    """Writes the values of rows or columns."""
    if lies_in_columns(matrix, dim):
        bits = _INTEGERS[matrix.itemsize]
        matrix.view(bits).scatter_(dim, _every_entry(matrix, dim, indices), values.view(bits))
    else:
        put(matrix, dim, indices, values)


def add_columns(
    x: Tensor,  # [*, columns], changed in place
    indices: Tensor,  # [s], int64, each at most once
    values: Tensor,  # [*, s], of x's dtype
) -> Tensor:  # x
    """`x.index_add_(-1, indices, values)`.

    Example:
        >>> add_columns(torch.zeros(1, 4, dtype=torch.bfloat16), torch.tensor([3, 1]), torch.ones(1, 2, dtype=torch.bfloat16))
        tensor([[0., 1., 0., 1.]], dtype=torch.bfloat16)
    """
    if x.itemsize > 2 or x.device.type != "cpu" or not x.is_contiguous():
        return x.index_add_(-1, indices, values)
    matrix = x.view(-1, x.shape[-1])
    put_slice(matrix, 1, indices, take_slice(matrix, 1, indices).add_(values.reshape(-1, len(indices))))
    return x


def lies_in_columns(matrix: Tensor, dim: int) -> bool:
    """Whether the slice's channels are columns of memory on a CPU: an entry for each row, far apart."""
    return matrix.ndim == 2 and matrix.device.type == "cpu" and matrix.stride(dim) == 1


def _every_entry(matrix: Tensor, dim: int, indices: Tensor) -> Tensor:
    """The index of each entry of the slice, for `gather` and `scatter_`: a view, which takes no memory."""
    if dim == 1:
        return indices.expand(matrix.shape[0], -1)
    return indices[:, None].expand(-1, matrix.shape[1])
