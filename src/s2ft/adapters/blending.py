"""The deltas of one module, blended: added up, or resolved where several adapters hold a channel.

    channels of A        1 2   4
    channels of B          2 3        union 1 2 3 4: taken from A, shared, taken from B, taken from A

    sum    Δ = Σ wᵢ Δᵢ
    ties   shared channels: entries of small magnitude dropped, a sign elected, those that agree averaged (arXiv 2306.01708)
    dare   shared channels: random entries dropped, the others divided by the density, then summed (arXiv 2311.03099)

A channel that one adapter alone holds is never resolved: nothing meets there, wᵢ Δᵢ is exact. Sums run in float32 (float64
for float64 deltas); TIES and DARE are PEFT's own functions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import reduce
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from s2ft.format.slices import Slice

BLENDINGS = ("sum", "ties", "dare")
DENSITY = 0.5  # of the shared entries, what TIES and DARE keep unless told otherwise


def blend(
    union: Slice,
    slices: Sequence[Slice],
    deltas: Sequence[Tensor],  # of each slice: [out_features, s] or [s, in_features], on the CPU
    weights: Sequence[float],
    method: str,
    density: float,
    draw: str,  # seeds DARE's choice
) -> Tensor:  # shaped by `union`
    """One module's deltas, blended; in the dtype that holds all of theirs.

    Example:
        >>> a, b = Slice.parse("out 1-2"), Slice.parse("out 2")
        >>> blend(a, [a, b], [torch.ones(2, 3), torch.ones(1, 3)], [1, 10], "sum", 1, "").tolist()
        [[1.0, 1.0, 1.0], [11.0, 11.0, 11.0]]
    """
    dtype = reduce(torch.promote_types, (delta.dtype for delta in deltas))
    wide = [delta.to(torch.promote_types(dtype, torch.float32)) for delta in deltas]
    places = [torch.from_numpy(np.searchsorted(union.indices, trained.indices)) for trained in slices]
    result = _laid_out(wide[0], union.dim, len(union.indices), -0.0)  # -0.0 + x is x, bit for bit; 0.0 + -0.0 is not
    for place, delta, weight in zip(places, wide, weights, strict=True):
        result.index_add_(union.dim, place, delta * weight)
    shared = (torch.bincount(torch.cat(places)) > 1).nonzero().flatten()
    if method != "sum" and len(shared):
        tasks = [
            _on_shared(delta, union.dim, place, shared, method, density, f"{draw} {number}")
            for number, (delta, place) in enumerate(zip(wide, places, strict=True))
        ]
        result.index_copy_(union.dim, shared, _resolve(torch.stack(tasks), weights, method))
    return result.to(dtype)


def _on_shared(
    delta: Tensor,
    dim: int,
    place: Tensor,  # [s], the delta's channels in the union
    shared: Tensor,  # [n], the shared channels in the union
    method: str,
    density: float,
    draw: str,
) -> Tensor:  # as delta, with n channels
    """One adapter's entries on the shared channels, thinned to `density`; zero on those that it does not hold."""
    from peft.utils.merge_utils import prune  # here, since a sum needs no PEFT, whose import takes seconds

    held = torch.isin(place, shared).nonzero().flatten()
    entries = delta.index_select(dim, held)
    if density < 1:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(
                int.from_bytes(hashlib.sha256(draw.encode()).digest()[:8], "little") >> 1
            )
            kind: Literal["magnitude", "random"] = "magnitude" if method == "ties" else "random"
            entries = prune(entries, density, kind, rescale=method == "dare")
    where = torch.searchsorted(shared, place[held])
    return _laid_out(entries, dim, len(shared), 0.0).index_copy_(dim, where, entries)


def _resolve(tasks: Tensor, weights: Sequence[float], method: str) -> Tensor:  # [adapters, *] → [*]
    weighted = tasks * torch.tensor(weights, dtype=tasks.dtype)[:, None, None]
    if method == "dare":
        return weighted.sum(0)
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    return disjoint_merge(weighted, calculate_majority_sign_mask(tasks))


def _laid_out(like: Tensor, dim: int, channels: int, value: float) -> Tensor:
    shape = list(like.shape)
    shape[dim] = channels
    return torch.full(shape, value, dtype=like.dtype)
