"""One batch, many adapters: each row of x has its own adapter, or none.

    input side (o, down)     y[t] += Σⱼ x[t, idxⱼ] V[j, :]        j over the channels of t's adapter; V's rows: [out_features]
    output side (q, ..., up) y[t, idxⱼ] += x[t] · V[j, :]                                                 [in_features]

The adapters of a layer are stored one after the other in one table with a row for each channel; an adapter is a range of rows,
and ranks may differ. Which product is fastest depends; measured on a CPU at d = 4096, 32 to 72 channels, 8 and 64 adapters,
float32 and bfloat16:

    few tokens a row     an embedding bag: its words are the table's rows, its weights are x[t, idx]. One call for all
    (decoding)           adapters, no padding, each row of the table read once, sums in float32. The output side is the
                         gradient of such a bag for its weights: a scalar product for each (token, channel). With equal
                         ranks, `torch.bmm` over the same table is as fast in float32, but takes two to three times as long
                         in bfloat16 on the input side; `torch._grouped_mm` takes longer still.
    many tokens a row    matrix products: rows whose ranks differ by a quarter at most share a `torch.bmm` over a copy of
    (prefill), or        their rows of the table, padded with the table's row of zeros. `torch._grouped_mm` needs no padding,
    gradients            but refuses float64 and odd strides, and was no faster.
    CUDA with Triton     `layer/mixed_triton.py`: one launch for each side

There is no loop over adapters, except when a new set of them is packed into a table. A layer keeps its table until the batch's
adapters change; what follows from names and shapes is kept with the batch, so `generate` computes it once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.layer.pack import MixedBatch, Pack, Step, find_slice, pack_slices, packed

FEW_TOKENS = 16  # per row; at so many, the two CPU paths take about the same time
_SPREAD = 1.25  # the largest rank divided by the smallest in one padded product


@dataclass(frozen=True, eq=False)
class Pairs:
    """All (token, channel) pairs that contribute, in the order of tokens."""

    rows: Tensor  # [pairs], of the table
    flat: Tensor  # [pairs], the channel's place in x (input side) or y (output side), flattened
    tokens: Tensor  # [pairs]
    bags: Tensor  # [tokens], where each token's pairs begin


@dataclass(frozen=True, eq=False)
class Bucket:
    """Rows of the batch whose adapters have about the same rank."""

    members: Tensor  # [n], batch rows
    rows: Tensor  # [n, w], of the table
    flat: Tensor  # [n, tokens, w], the channel's place in x or y, flattened


def add_mixed(
    layer: nn.Module,  # S2FTLinear
    y: Tensor,  # [rows, *, out_features], the base layer's output for x
    x: Tensor,  # [rows, *, in_features]
    names: list[str],  # one for each row; an adapter without a slice of this layer adds nothing
) -> Tensor:  # [rows, *, out_features]; y itself, if it may be changed
    """Adds to each row what its own adapter contributes; differentiable."""
    batch = names if isinstance(names, MixedBatch) else MixedBatch(names)
    if not y.numel():
        return y
    x, tokens = x.to(y.dtype), y.numel() // (len(batch) * y.shape[-1])
    if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad or _trains(layer, batch)):
        for pack in pack_slices(layer, batch, y):
            y = _by_buckets(pack, y, x, _buckets(pack, batch.of_row, tokens, _width(pack, y, x), y.device), False)
        return y
    x, y = x.contiguous(), y.contiguous()
    steps = batch.steps.get((layer, y.dtype)) if tokens == 1 else None  # decoding: the same steps as for the last token
    for add, pack, plan in _steps(layer, batch, y, x, tokens) if steps is None else steps:
        y = add(pack, y, x, plan)
    return y


def _way(x: Tensor, tokens: int) -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    """The function that adds without gradients, and the one that prepares its plan."""
    if x.is_cuda and x.element_size() <= 4 and _has_triton():
        from s2ft.layer.mixed_triton import add_by_kernel, tiles  # deferred: needs Triton

        return add_by_kernel, tiles
    if tokens <= FEW_TOKENS:
        return _by_pairs, _pairs
    return lambda pack, y, x, plan: _by_buckets(pack, y, x, plan, True), _buckets


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


# ---- packing ------------------------------------------------------------------------------------------------------


def _trains(layer: nn.Module, batch: MixedBatch) -> bool:
    slices = (find_slice(layer, name) for name in batch.distinct)
    return any(found is not None and found.weight.requires_grad for found in slices)


# ---- preparing ----------------------------------------------------------------------------------------------------


def _steps(layer: nn.Module, batch: MixedBatch, y: Tensor, x: Tensor, tokens: int) -> list[Step]:
    """What to add, and how; kept with the batch if there is one token per row, as in decoding."""
    add, prepare = _way(x, tokens)
    packs = packed(layer, batch, y)
    steps = [(add, pack, prepare(pack, batch.of_row, tokens, _width(pack, y, x), y.device)) for pack in packs]
    if tokens == 1:
        batch.steps[layer, y.dtype] = steps
    return steps


def _width(pack: Pack, y: Tensor, x: Tensor) -> int:
    """The number of features on the sliced side."""
    return int((x if pack.side == "in" else y).shape[-1])


def _pairs(pack: Pack, of_row: Tensor, tokens: int, width: int, device: torch.device) -> Pairs:
    counts = pack.counts[of_row].repeat_interleave(tokens)
    bags = counts.cumsum(0) - counts
    token = torch.arange(len(counts)).repeat_interleave(counts)
    rows = (pack.starts[of_row].repeat_interleave(tokens) - bags)[token] + torch.arange(len(token))
    flat = token * width + pack.channels[rows]
    return Pairs(*(part.to(device) for part in (rows, flat, token, bags)))


def _buckets(pack: Pack, of_row: Tensor, tokens: int, width: int, device: torch.device) -> list[Bucket]:
    counts, starts = pack.counts[of_row], pack.starts[of_row]
    bucket = torch.where(counts > 0, (counts.double().log() / math.log(_SPREAD)).floor(), -1)
    found = []
    for number in bucket[bucket >= 0].unique():
        members = (bucket == number).nonzero()  # [n, 1]
        within = torch.arange(int(counts[members].max()))
        rows = torch.where(within < counts[members], starts[members] + within, len(pack.table) - 1)
        token = members * tokens + torch.arange(tokens)  # [n, tokens]
        flat = token[:, :, None] * width + pack.channels[rows][:, None]
        found.append(Bucket(*(part.to(device) for part in (members[:, 0], rows, flat))))
    return found


# ---- adding -------------------------------------------------------------------------------------------------------


def _by_pairs(pack: Pack, y: Tensor, x: Tensor, plan: Pairs) -> Tensor:  # adds to y in place
    if not len(plan.rows):
        return y
    if pack.side == "in":
        selected = x.take(plan.flat)
        # As F.embedding_bag(..., mode="sum"), but without its checks, whose time matters for few rows
        sums, *_ = torch.embedding_bag(pack.table, plan.rows, plan.bags, False, 0, False, selected)
        return y.add_(sums.view_as(y))
    product = torch.ops.aten._embedding_bag_per_sample_weights_backward(  # noqa: SLF001 - else only through autograd
        x.view(-1, x.shape[-1]), pack.table, plan.rows, plan.bags, plan.tokens, 0
    )
    y.view(-1).index_add_(0, plan.flat, product)
    return y


def _by_buckets(pack: Pack, y: Tensor, x: Tensor, plan: list[Bucket], in_place: bool) -> Tensor:
    add = Tensor.index_add_ if in_place else Tensor.index_add
    for bucket in plan:
        table = pack.table[bucket.rows]  # [n, w, across]
        if pack.side == "in":
            selected = x.reshape(-1).index_select(0, bucket.flat.view(-1)).view(bucket.flat.shape)
            sums = torch.bmm(selected, table)
            y = add(y, 0, bucket.members, sums.view(-1, *y.shape[1:]))
        else:
            rows = x.reshape(len(x), -1, x.shape[-1]).index_select(0, bucket.members)
            product = torch.bmm(rows, table.transpose(1, 2))
            y = add(y.reshape(-1), 0, bucket.flat.view(-1), product.reshape(-1)).view(y.shape)
    return y
