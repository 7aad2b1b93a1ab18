"""Products of rows with the matrix of their group, all groups in one call.

    rows       a a a c c      sorted by group; `ends` 3 3 5: where each group's rows end
    y[rows of g] = x[rows of g] @ weights[g]

torch's `grouped_mm` takes what is aligned to 16 bytes and no float64. All else is laid out as one batch, padded to the longest
group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16  # bytes, of every row
_KERNELS = (torch.bfloat16, torch.float16, torch.float32)


def grouped_product(
    x: Tensor,  # [rows, in]
    weights: Tensor,  # [groups, in, out]
    ends: Tensor,  # [groups], int32
) -> Tensor:  # [rows, out]
    """Each row times its group's matrix.

    Example:
        >>> weights = torch.tensor([[[1.0]], [[10.0]]])
        >>> grouped_product(torch.ones(3, 1), weights, torch.tensor([1, 3], dtype=torch.int32)).flatten().tolist()
        [1.0, 10.0, 10.0]
    """
    if _has_kernel(x) and _has_kernel(weights) and weights.shape[1] * x.itemsize % ALIGNMENT == 0:
        return F.grouped_mm(x, weights, offs=ends)
    place, longest = _places(ends, len(x))
    return torch.bmm(_as_batch(x, place, longest, len(ends)), weights)[place]


def grouped_outer(
    x: Tensor,  # [rows, in]
    y: Tensor,  # [rows, out]
    ends: Tensor,  # [groups], int32
) -> Tensor:  # [groups, in, out]
    """For each group the sum of xᵀ y over its rows: what a product's gradient to the weights is."""
    if _has_kernel(x) and _has_kernel(y):
        return F.grouped_mm(x.T, y, offs=ends)
    place, longest = _places(ends, len(x))
    return torch.bmm(_as_batch(x, place, longest, len(ends)).mT, _as_batch(y, place, longest, len(ends)))


def _has_kernel(matrix: Tensor) -> bool:
    """Whether torch's kernel takes rows of this length and dtype."""
    return matrix.dtype in _KERNELS and matrix.shape[-1] * matrix.itemsize % ALIGNMENT == 0


def _places(ends: Tensor, rows: int) -> tuple[tuple[Tensor, Tensor], int]:
    """Each row's group and its place there, [rows] each, and the length of the longest group."""
    ends = ends.long()
    counts = ends.diff(prepend=ends.new_zeros(1))
    group = torch.arange(len(ends), device=ends.device).repeat_interleave(counts, output_size=rows)
    place = torch.arange(rows, device=ends.device) - (ends - counts)[group]
    return (group, place), int(counts.max())


def _as_batch(
    x: Tensor,  # [rows, features]
    place: tuple[Tensor, Tensor],
    longest: int,
    groups: int,
) -> Tensor:  # [groups, longest, features]
    return x.new_zeros(groups, longest, x.shape[1]).index_put(place, x)
