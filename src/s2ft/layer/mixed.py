"""One batch, many adapters: each row of x has its own adapter, or none.

    input side (o, down)     y[t] += Σⱼ x[t, idxⱼ] V[j, :]        j over the channels of t's adapter; V's rows: [out_features]
    output side (q, ..., up) y[t, idxⱼ] += x[t] · V[j, :]                                                 [in_features]

The adapters of a layer are stored one after the other in one table with a row for each channel; an adapter is a range of rows,
and ranks may differ. All of them read the same bytes; which product does it fastest depends on dtype, ranks and rows:

    matrices   `torch.bmm` over the table itself: adapters of one rank lie side by side, so their rows are a view of shape
               [adapters, rank, across], and nothing is copied. If the batch's rows are in the table's order, one for each
               adapter, as they are when the table was made for them, the input side is added to y by the product itself.
    padded     rows whose ranks differ by a quarter at most share a `torch.bmm` over a copy of their rows of the table, padded
               with the table's row of zeros. `torch._grouped_mm` needs no padding, but refuses float64 and odd strides, and
               was no faster.
    bag        an embedding bag: its words are the table's rows, its weights are x[t, idx]. No padding at any ranks, each row
               of the table read once, sums in float32. The output side is the gradient of such a bag for its weights: a
               scalar product for each (token, channel).
    CUDA with Triton    `layer/mixed_triton.py`: one launch for each side

Decoding takes the bag in half precision, where it was faster than `bmm` on the input side, and in float32
only where ranks are too many for matrices. Many tokens and gradients take matrices, else padded ones. `s2ft bench parallel`.

There is no loop over adapters, except when a new set of them is packed into a table. A layer keeps its table until the batch's
adapters change; what follows from names and shapes is kept with the batch, so `generate` computes it once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from s2ft.layer.pack import MixedBatch, Pack, Step, find_slice, pack_slices, packed

FEW_TOKENS = 16  # per row; at so many, bags and padded matrices take about the same time
_SPREAD = 1.25  # the largest rank divided by the smallest in one padded product; the padded rows divided by the rows
_SPREAD_OF_FEW = 2.0  # the latter with few tokens, where reading the table takes the time
_MOST_RANKS = 4  # products of matrices for one layer


@dataclass(frozen=True, eq=False)
class Pairs:
    """All (token, channel) pairs that contribute, in the order of tokens."""

    rows: Tensor  # [pairs], of the table
    flat: Tensor  # [pairs], the channel's place in x (input side) or y (output side), flattened
    tokens: Tensor  # [pairs]
    bags: Tensor  # [tokens], where each token's pairs begin


@dataclass(frozen=True, eq=False)
class Matrices:
    """Rows of the batch for one `bmm`: a matrix for each adapter, or for each row."""

    table: Tensor | None  # [matrices, w, across], a view of the table
    rows: Tensor | None  # [matrices, w], of the table, where it is no view
    shape: tuple[int, int, int]  # matrices; tokens of each, padding included; w
    members: Tensor  # [matrices * m], batch rows; on the input side, [n] without padding
    flat: Tensor  # [matrices, m * tokens, w], the channel's place in x or y (`_onto_rows`: in its row of x); on the output
    # side [*] without padding
    kept: Tensor | None  # [n], which of all members are no padding; None: all
    is_whole: bool  # the members are the batch's rows in their order


def add_mixed(
    layer: nn.Module,  # S2FTLinear
    y: Tensor,  # [rows, *, out_features], the base layer's output for x
    x: Tensor,  # [rows, *, in_features]
    batch: MixedBatch,  # an adapter for each row; one without a slice of this layer adds nothing
) -> Tensor:  # [rows, *, out_features]; y itself, if it may be changed
    """Adds to each row what its own adapter contributes; differentiable."""
    x = x.to(y.dtype)
    steps = batch.steps.get((layer, y.dtype, y.shape))  # decoding: the same steps as for the last token
    if steps is None or torch.is_grad_enabled():
        if not y.numel():
            return y
        tokens = y.numel() // (len(batch) * y.shape[-1])
        if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad or _trains(layer, batch)):
            return _differentiable(layer, batch, y, x, tokens)
        steps = _steps(layer, batch, y, x, tokens) if steps is None else steps
    x, y = x.contiguous(), y.contiguous()
    for add, pack, plan in steps:
        y = add(pack, y, x, plan)
    return y


def _differentiable(layer: nn.Module, batch: MixedBatch, y: Tensor, x: Tensor, tokens: int) -> Tensor:
    for pack in pack_slices(layer, batch, y):
        for plan in _any_matrices(pack, batch.places(pack.names), tokens, _width(pack, y, x), y.device):
            y = _by_matrices(pack, y, x, plan, in_place=False)
    return y


def _trains(layer: nn.Module, batch: MixedBatch) -> bool:
    slices = (find_slice(layer, name) for name in batch.distinct)
    return any(found is not None and found.weight.requires_grad for found in slices)


# ---- which product ------------------------------------------------------------------------------------------------


def _steps(layer: nn.Module, batch: MixedBatch, y: Tensor, x: Tensor, tokens: int) -> list[Step]:
    """What to add, and how; kept with the batch if there is one token per row, as in decoding."""
    steps = [step for pack in packed(layer, batch, y) for step in _of_pack(pack, batch, y, x, tokens)]
    if tokens == 1:
        batch.steps[layer, y.dtype, y.shape] = steps
    return steps


def _of_pack(pack: Pack, batch: MixedBatch, y: Tensor, x: Tensor, tokens: int) -> list[Step]:
    """The products for this batch, and their plans; without gradients."""
    where = (pack, batch.places(pack.names), tokens, _width(pack, y, x), y.device)
    if y.is_cuda and y.element_size() <= 4 and _has_triton():
        from s2ft.layer.mixed_triton import add_by_kernel, tiles  # deferred: needs Triton

        return [(add_by_kernel, pack, tiles(*where))]
    if tokens > FEW_TOKENS:
        found: list[Matrices] | None = _any_matrices(*where)
    else:
        found = _matrices(*where, _SPREAD_OF_FEW) if y.element_size() > 2 else None
    if found is None:
        return [(_by_pairs, pack, _pairs(*where))]
    return [_by_plan(pack, one, y, x) for one in found]


def _by_plan(pack: Pack, plan: Matrices, y: Tensor, x: Tensor) -> Step:
    if pack.side == "out" or not plan.is_whole:
        return _by_matrices, pack, plan
    if plan.table is not None and plan.shape[:2] == y.shape[:-1]:
        return _onto_rows, pack, replace(plan, flat=plan.flat % x.shape[-1])
    return _onto, pack, plan


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _width(pack: Pack, y: Tensor, x: Tensor) -> int:
    """The number of features on the sliced side."""
    return int((x if pack.side == "in" else y).shape[-1])


# ---- plans --------------------------------------------------------------------------------------------------------


def _pairs(pack: Pack, of_row: Tensor, tokens: int, width: int, device: torch.device) -> Pairs:
    counts = pack.counts[of_row].repeat_interleave(tokens)
    bags = counts.cumsum(0) - counts
    token = torch.arange(len(counts)).repeat_interleave(counts)
    rows = (pack.starts[of_row].repeat_interleave(tokens) - bags)[token] + torch.arange(len(token))
    flat = token * width + pack.channels[rows]
    return Pairs(*(part.to(device) for part in (rows, flat, token, bags)))


def _any_matrices(pack: Pack, of_row: Tensor, tokens: int, width: int, device: torch.device) -> list[Matrices]:
    """Of the table itself, or else padded."""
    found = _matrices(pack, of_row, tokens, width, device, _SPREAD)
    return _padded(pack, of_row, tokens, width, device) if found is None else found


def _matrices(
    pack: Pack, of_row: Tensor, tokens: int, width: int, device: torch.device, spread: float
) -> list[Matrices] | None:
    """One for each rank; None if there are too many ranks, or too much padding as some adapters have many rows."""
    counts = pack.counts[of_row]
    ranks = counts[counts > 0].unique().tolist()
    if len(ranks) > _MOST_RANKS:
        return None
    found = [_of_rank(pack, of_row, rank, tokens, width, device) for rank in ranks]
    padded = sum(one.shape[0] * one.shape[1] for one in found)
    return found if padded <= spread * tokens * int((counts > 0).sum()) else None


def _of_rank(pack: Pack, of_row: Tensor, rank: int, tokens: int, width: int, device: torch.device) -> Matrices:
    """For the adapters of one rank, which lie side by side in the table, as many rows each as the one that has most."""
    rows = (pack.counts[of_row] == rank).nonzero()[:, 0]
    rows = rows[pack.starts[of_row[rows]].argsort(stable=True)]
    starts, sizes = pack.starts[of_row[rows]].unique_consecutive(return_counts=True)
    most, begins = int(sizes.max()), sizes.cumsum(0) - sizes
    owner = torch.arange(len(sizes)).repeat_interleave(sizes)
    kept = owner * most + torch.arange(len(rows)) - begins[owner]
    members = rows[begins].repeat_interleave(most)
    members[kept] = rows
    of_table = slice(int(starts[0]), int(starts[0]) + len(starts) * rank)
    token = (members[:, None] * tokens + torch.arange(tokens)).view(len(starts), -1, 1)
    flat = token * width + pack.channels[of_table].view(len(starts), 1, rank)  # [adapters, most * tokens, rank]
    is_whole = len(members) == len(of_row) and torch.equal(members, torch.arange(len(of_row)))
    is_padded = len(kept) < len(members)
    if is_padded and pack.side == "out":
        flat = flat.view(len(members), -1)[kept]
    elif is_padded:
        members = rows
    table = pack.table[of_table].view(len(starts), rank, -1)
    shape = (len(starts), most * tokens, rank)
    at = (members.to(device), flat.to(device), kept.to(device) if is_padded else None)
    return Matrices(table, None, shape, *at, is_whole)


def _padded(pack: Pack, of_row: Tensor, tokens: int, width: int, device: torch.device) -> list[Matrices]:
    """A matrix for each row, of the table's rows and zeros."""
    counts, starts = pack.counts[of_row], pack.starts[of_row]
    bucket = torch.where(counts > 0, (counts.double().log() / math.log(_SPREAD)).floor(), -1)
    found = []
    for number in bucket[bucket >= 0].unique():
        members = (bucket == number).nonzero()  # [n, 1]
        within = torch.arange(int(counts[members].max()))
        rows = torch.where(within < counts[members], starts[members] + within, len(pack.table) - 1)
        token = members * tokens + torch.arange(tokens)  # [n, tokens]
        flat = token[:, :, None] * width + pack.channels[rows][:, None]
        shape = (rows.shape[0], tokens, rows.shape[1])
        at = (members[:, 0].to(device), flat.to(device), None)
        found.append(Matrices(None, rows.to(device), shape, *at, len(members) == len(of_row)))
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


def _onto_rows(pack: Pack, y: Tensor, x: Tensor, plan: Matrices) -> Tensor:
    """As `_onto`, where each row is a matrix: two operations and no more, since with few adapters it is calls that count."""
    return y.baddbmm_(x.gather(-1, plan.flat), plan.table)  # type: ignore[arg-type]


def _onto(pack: Pack, y: Tensor, x: Tensor, plan: Matrices) -> Tensor:
    """The input side of a whole batch in its order: the product itself adds to y, in place."""
    y.view(*plan.shape[:2], -1).baddbmm_(x.take(plan.flat), _table(pack, plan))
    return y


def _by_matrices(pack: Pack, y: Tensor, x: Tensor, plan: Matrices, in_place: bool = True) -> Tensor:
    add, table = Tensor.index_add_ if in_place else Tensor.index_add, _table(pack, plan)
    if pack.side == "in":
        sums = torch.bmm(x.take(plan.flat), table).view(-1, *y.shape[1:])
        return add(y, 0, plan.members, _kept(sums, plan))
    rows = x if plan.is_whole else x.index_select(0, plan.members)
    product = torch.bmm(rows.reshape(*plan.shape[:2], -1), table.transpose(1, 2)).view(len(plan.members), -1)
    return add(y.reshape(-1), 0, plan.flat.view(-1), _kept(product, plan).view(-1)).view(y.shape)


def _table(pack: Pack, plan: Matrices) -> Tensor:  # [matrices, w, across]
    return pack.table[plan.rows] if plan.table is None else plan.table


def _kept(product: Tensor, plan: Matrices) -> Tensor:  # product: [members, *], padding included
    return product if plan.kept is None else product.index_select(0, plan.kept)
