"""Scores that need no data: random, weight, lift; and how a unit's weights are found in a layer.

The paper leaves open how scores combine over q, k, v and o, and over a head's dimensions. Taken here: the Frobenius norm over
all weights of the unit, in every projection of its structure, trained or not (a key-value head's weights count for each
query head of its group). LIFT's rank is a 32nd of each weight's smaller side: 128 for a width of 4096.

Of a model that is sharded over processes (FSDP2, ZeRO-3), one weight after the other is gathered, in all of them.

Sums run in float64 and end in float32: what differs in the last digits between machines does not change the ranking.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from s2ft.common.errors import S2FTError
from s2ft.layer.dequantise import values_of
from s2ft.layer.dequantise import why_unreadable as why_layer_unreadable
from s2ft.layer.stacked import linear_at
from s2ft.selection.units import Projection, Structure

Batch = Mapping[str, Any]
"""What the model is called with: `model(**batch)`."""

Scores = dict[str, NDArray[np.float32]]
"""`Structure.key` → its units' scores, [units]."""

LIFT_RANK = 1 / 32  # of the smaller side of the weight
_CHUNK = 1 << 19  # elements squared at once: small enough to stay in a core's cache


def by_hash(structures: list[Structure], model: nn.Module, batches: Iterable[Batch], seed: int = 0) -> Scores:
    """Random: a hash of the seed, the structure and the unit."""
    return {s.key: random_scores(seed, s.key, s.units) for s in structures}


def by_weight(structures: list[Structure], model: nn.Module, batches: Iterable[Batch] = ()) -> Scores:
    """The Frobenius norm of each unit's weights in all projections of its structure (S²FT-W)."""
    return {s.key: root(_sum_over_projections(s, model, channel_squares)) for s in structures}


def by_lift(structures: list[Structure], model: nn.Module, batches: Iterable[Batch]) -> Scores:
    """The norm of each unit's part of the low-rank approximations of its projections' weights (arXiv 2506.00772)."""
    return {s.key: root(_sum_over_projections(s, model, _lift_squares)) for s in structures}


def random_scores(seed: int, name: str, units: int) -> NDArray[np.float32]:  # [units] in [0, 1)
    """The same on every machine and under every version of torch and NumPy: SHAKE-128 of the seed and the name.

    Example:
        >>> random_scores(0, "mlp", 3).round(3).tolist() == random_scores(0, "mlp", 5).round(3).tolist()[:3]
        True
    """
    stream = hashlib.shake_128(f"{seed}/{name}".encode()).digest(4 * units)
    return (np.frombuffer(stream, dtype="<u4") >> 8).astype(np.float32) / np.float32(1 << 24)


def unit_weights(projection: Projection, model: nn.Module) -> Tensor:  # [projection.units, width, across]
    """The weights of each unit in one projection; `across` is the size of the layer's other side.

    A view, or of a quantised layer a dequantised copy.

    Raises:
        S2FTError: if the layer's weight is partitioned, or has no values here.

    Example:
        >>> projection = Projection("o_proj", "0", "in", units=2, width=3)
        >>> unit_weights(projection, nn.Sequential(nn.Linear(6, 5))).shape
        torch.Size([2, 3, 5])
    """
    if reason := why_unreadable(projection, model):
        raise S2FTError(reason)
    matrix = values_of(linear_of(projection, model))
    rows = _part(matrix, projection) if projection.side == "out" else _part(matrix, projection).T
    return rows.reshape(projection.units, projection.width, rows.shape[1])


def why_unreadable(projection: Projection, model: nn.Module) -> str | None:
    """Why the projection's weight cannot be scored; None where it can."""
    reason = why_layer_unreadable(linear_of(projection, model))
    return None if reason is None else f"the weight of {projection.module} {reason}"


def unit_sums(
    values: Tensor,  # [projection.units * width], one for each channel of the projection
    structure: Structure,
    projection: Projection,
) -> Tensor:  # [structure.units]
    """Sums over each unit's channels; a key-value head's sum goes to every query head of its group."""
    sums = values.view(projection.units, projection.width).sum(1)
    return sums.repeat_interleave(structure.units // projection.units)


def channel_squares(
    matrix: Tensor,  # [out_features, in_features]: the layer's weight, or its gradient
    projection: Projection,
) -> Tensor:  # [projection.units * width], float64, on the CPU
    """The squared norm of each of the projection's channels."""
    return _square_sums(_part(matrix, projection), along=1 if projection.side == "out" else 0).cpu()


def linear_of(projection: Projection, model: nn.Module) -> nn.Module:
    """The linear layer of a projection, below any adapter."""
    layer = linear_at(model, projection.module)
    assert layer is not None
    return layer


def root(squares: Tensor) -> NDArray[np.float32]:  # both [units]
    """From squared sums to scores."""
    scores: NDArray[np.float32] = squares.sqrt().float().numpy()
    return scores


def _sum_over_projections(
    structure: Structure, model: nn.Module, squares: Callable[[Tensor, Projection], Tensor]
) -> Tensor:  # [units], float64
    total = torch.zeros(structure.units, dtype=torch.float64)
    for projection in structure.projections:
        matrix = values_of(linear_of(projection, model))  # a quantised layer's, for the moment
        total += unit_sums(squares(matrix, projection), structure, projection)
    return total


def _part(matrix: Tensor, projection: Projection) -> Tensor:  # both [out_features, in_features], one side fewer; a view
    """A projection's rows or columns of the layer that holds it, which may hold others too, or stacks those of experts."""
    if matrix.ndim == 3:
        expert, offset = divmod(projection.offset, matrix.shape[1 if projection.side == "out" else 2])
        matrix, projection = matrix[expert], replace(projection, offset=offset)
    return matrix[projection.channels] if projection.side == "out" else matrix[:, projection.channels]


def _square_sums(matrix: Tensor, along: int) -> Tensor:  # [rows, columns] → [rows] (along 1) or [columns], float64
    """Chunked by rows, so that the float32 copies stay in cache: 7B weights take about two seconds on two cores."""
    chunks = matrix.split(max(1, _CHUNK // max(1, matrix.shape[1])))
    if along == 1:
        return torch.cat([chunk.float().square().sum(1, dtype=torch.float64) for chunk in chunks])
    total = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for chunk in chunks:
        total += chunk.float().square().sum(0, dtype=torch.float64)
    return total


def _lift_squares(matrix: Tensor, projection: Projection) -> Tensor:  # [out_features, in_features] → [units * width]
    own = _part(matrix, projection).double()
    return _low_rank_squares(own, along=1 if projection.side == "out" else 0).cpu()


def _low_rank_squares(matrix: Tensor, along: int) -> Tensor:  # [rows, columns] → [rows] (along 1) or [columns], float64
    """Sums of squares of the best approximation of rank `LIFT_RANK`; its factors come from the smaller Gram matrix."""
    is_wide = matrix.shape[0] <= matrix.shape[1]
    wide = matrix if is_wide else matrix.T  # [smaller, larger]
    rank = max(1, round(LIFT_RANK * wide.shape[0]))
    _, vectors = torch.linalg.eigh(wide @ wide.T)  # ascending: the largest are last
    basis: Tensor = vectors[:, -rank:]  # [smaller, rank]
    loads: Tensor = basis.T @ wide  # [rank, larger]: the approximation is basis @ loads
    if (along == 1) == is_wide:
        basis = basis * torch.linalg.vector_norm(loads, dim=1)
        return basis.square().sum(1)
    return loads.square().sum(0)
