"""The products of a mixed batch on a GPU, in Triton: one launch for each side of a projection.

    input side    a program has up to 16 tokens of one adapter and 128 columns of y. It gathers x[t, idx], multiplies with the
                  adapter's rows of the table, and adds to y: gather, product and addition in one launch.
    output side   a program has up to 16 tokens of one adapter and 16 of its channels. It multiplies x[t] with the channels'
                  rows of the table, and adds to y[t, idx]. No two programs share an element of y: no atomics.

Tokens are sorted by adapter and cut into tiles; an adapter without tokens has no tile, a token without an adapter is in
none. Nothing is padded but the last tile of an adapter. Sums are in float32. Imported only where a batch is on a GPU and
Triton is there; TRITON_INTERPRET=1 runs the kernels on the CPU, as `make test-kernels` does.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2ft.common.errors import S2FTError
from s2ft.layer.pack import Pack

TOKENS = 16  # the least that a tensor core multiplies
CHANNELS = 16
COLUMNS = 128  # of y (input side), or of x at a time (output side)


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tokens by adapter, on the GPU."""

    order: Tensor  # [tokens that have an adapter], int64, sorted by adapter
    tiles: Tensor  # [tiles, 4], int64: first place in `order`, tokens, first row of the table, rows
    channels: Tensor  # [channels + 1], int64, as in `Pack`
    most_rows: int  # of a tile


def tiles(pack: Pack, of_row: Tensor, tokens: int, width: int, device: torch.device) -> Tiles:
    """Cuts the batch's tokens into tiles of one adapter each; the parameters are those of `mixed._pairs`."""
    adapter = of_row.repeat_interleave(tokens)
    order = adapter.argsort(stable=True)
    order = order[pack.counts[adapter[order]] > 0]
    here, sizes = adapter[order].unique_consecutive(return_counts=True)
    number = (sizes + TOKENS - 1) // TOKENS  # tiles of each adapter
    owner = torch.arange(len(here)).repeat_interleave(number)
    within = TOKENS * (torch.arange(len(owner)) - (number.cumsum(0) - number)[owner])
    first = (sizes.cumsum(0) - sizes)[owner] + within
    rows = pack.counts[here][owner]
    cut = torch.stack([first, (sizes[owner] - within).clamp(max=TOKENS), pack.starts[here][owner], rows], dim=1)
    most = int(rows.max()) if len(rows) else 0
    return Tiles(order.to(device), cut.to(device), pack.channels.to(device), most)


def add_by_kernel(
    pack: Pack,
    y: Tensor,  # [rows, *, out_features], contiguous; changed in place
    x: Tensor,  # [rows, *, in_features], contiguous, of y's dtype: float32, bfloat16 or float16
    plan: Tiles,
) -> Tensor:  # y
    """Adds what the batch's adapters add."""
    if not len(plan.tiles):
        return y
    sizes = (x.shape[-1], y.shape[-1])
    wide = sizes[1] if pack.side == "in" else sizes[0]
    if pack.table.shape[1] != wide or not pack.table.is_contiguous():  # it strides by the layer's width
        raise S2FTError(f"the slices have {pack.table.shape[1]} features on their other side, the layer {wide}")
    kernel, across, block = (
        (_input_side, sizes[1], COLUMNS) if pack.side == "in" else (_output_side, plan.most_rows, CHANNELS)
    )
    grid = (len(plan.tiles), triton.cdiv(across, block))
    constants: dict[str, Any] = {"TOKENS": TOKENS, "CHANNELS": CHANNELS, "COLUMNS": COLUMNS, "WIDE": _interpreted()}
    kernel[grid](x, y, pack.table, plan.channels, plan.order, plan.tiles, *sizes, **constants)
    return y


def _interpreted() -> bool:
    """Triton's interpreter multiplies bfloat16 as if it were integers; there operands are widened, which is exact."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _input_side(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes pointers and sizes one by one
    x,
    y,
    table,
    channels,
    order,
    tiles,
    inputs,
    outputs,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile = tiles + 4 * tl.program_id(0)
    first, count, start, rows = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    place = tl.arange(0, TOKENS)
    token = tl.load(order + first + place, mask=place < count, other=0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for begin in range(0, rows, CHANNELS):
        row = begin + tl.arange(0, CHANNELS)
        channel = tl.load(channels + start + row, mask=row < rows, other=0)
        there = (place < count)[:, None] & (row < rows)[None, :]
        selected = tl.load(x + token[:, None] * inputs + channel[None, :], mask=there, other=0.0)
        there = (row < rows)[:, None] & (column < outputs)[None, :]
        delta = tl.load(table + (start + row)[:, None] * outputs + column[None, :], mask=there, other=0.0)
        if WIDE:
            selected, delta = selected.to(tl.float32), delta.to(tl.float32)
        sums = tl.dot(selected, delta, sums, input_precision="ieee")
    there = (place < count)[:, None] & (column < outputs)[None, :]
    target = y + token[:, None] * outputs + column[None, :]
    tl.store(target, (tl.load(target, mask=there, other=0.0) + sums).to(y.dtype.element_ty), mask=there)


@triton.jit
def _output_side(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - see above
    x,
    y,
    table,
    channels,
    order,
    tiles,
    inputs,
    outputs,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile = tiles + 4 * tl.program_id(0)
    first, count, start, rows = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    if tl.program_id(1) * CHANNELS < rows:
        place = tl.arange(0, TOKENS)
        token = tl.load(order + first + place, mask=place < count, other=0)
        row = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        sums = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
        for begin in range(0, inputs, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            there = (place < count)[:, None] & (column < inputs)[None, :]
            source = tl.load(x + token[:, None] * inputs + column[None, :], mask=there, other=0.0)
            there = (row < rows)[:, None] & (column < inputs)[None, :]
            delta = tl.load(table + (start + row)[:, None] * inputs + column[None, :], mask=there, other=0.0)
            if WIDE:
                source, delta = source.to(tl.float32), delta.to(tl.float32)
            sums = tl.dot(source, tl.trans(delta), sums, input_precision="ieee")
        there = (place < count)[:, None] & (row < rows)[None, :]
        channel = tl.load(channels + start + row, mask=row < rows, other=0)
        target = y + token[:, None] * outputs + channel[None, :]
        tl.store(target, (tl.load(target, mask=there, other=0.0) + sums).to(y.dtype.element_ty), mask=there)
