"""Tokens and channels of stacked experts, laid out for grouped products.

    Routing   pairs of a token and one of its experts, sorted by expert, as transformers' grouped_mm has them
    Table     the channels of each expert that slices hold, with room for as many in every expert: [experts, k]

So one product serves all experts (`layer/grouped.py`). Room that an expert does not need costs what it would if it were used:
slices of about the same size in every expert, which a uniform allocation gives, waste none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2ft.layer.stacked import DOWN, Experts

_MULTIPLE = 8  # of channels: 16 bytes in half precision, which grouped products want


@dataclass(frozen=True, eq=False)
class Routing:
    """Which rows of the experts' input go to which expert: pairs of a token and an expert, sorted by expert."""

    tokens: Tensor  # [pairs], int64: the row of the input
    owners: Tensor  # [pairs], int64: the expert
    ends: Tensor  # [experts], int32: where each expert's pairs end
    weights: Tensor | None  # [pairs], the routing weights; None where the input has them in it
    places: Tensor  # [pairs], int64: where the pairs of the first token are, of the second, ...
    top: int  # pairs of a token

    @staticmethod
    def of(
        experts: Experts,
        x: Tensor,  # [tokens, hidden]
        index: Tensor | None = None,  # [tokens, top], the experts of each token
        weights: Tensor | None = None,  # [tokens, top]
    ) -> Routing:
        """As the experts' module was called."""
        numbers = torch.arange(experts.count, device=x.device)
        if index is None or weights is None:
            owners, top = numbers.repeat_interleave(len(x) // experts.count), 1
            order = torch.arange(len(x), device=x.device)
        else:
            top, beyond = index.shape[1], index >= experts.count  # some routers mark a pair as skipped by such a number
            owners, order = index.clamp(max=experts.count - 1).flatten().sort(stable=True)
            weights = weights.masked_fill(beyond, 0).flatten()[order]
        ends = torch.searchsorted(owners, numbers, right=True, out_int32=True)
        return Routing(order // top, owners, ends, weights, order.argsort(), top)

    def gathered(self, x: Tensor) -> Tensor:  # [tokens, features] → [pairs, features]
        """Each pair's token."""
        return x.index_select(0, self.tokens)

    def summed(self, rows: Tensor) -> Tensor:  # [pairs, features] → [tokens, features]
        """The sum over each token's pairs, always in the same order."""
        by_token: Tensor = rows.index_select(0, self.places).unflatten(0, (-1, self.top))
        return by_token.sum(1)


@dataclass(frozen=True, eq=False)
class Table:
    """The channels of each expert that any of some slices holds, with room for as many in every expert."""

    channels: Tensor  # [experts, k], int64: their places in the expert; 0 in what is left empty
    rows: Tensor  # [experts, k or 2 k], int64: the rows of `up` that compute them
    places: tuple[
        Tensor, ...
    ]  # of each slice: [experts, k] or like `rows`, the delta's channel there; its number where none

    @staticmethod
    def of(experts: Experts, slices: Sequence[tuple[str, Tensor]], device: torch.device) -> Table:
        """For slices of these parameters, each with its indices, which may lie elsewhere than the layer's input."""
        units = [_units(experts, name, indices.cpu()) for name, indices in slices]
        held = torch.cat(units).unique()  # [n], of all experts side by side
        owner, channel = held // experts.channels, held % experts.channels
        counts = torch.bincount(owner, minlength=experts.count)
        room = -(-int(counts.max()) // _MULTIPLE) * _MULTIPLE
        column = torch.arange(len(held)) - (counts.cumsum(0) - counts)[owner]
        channels = torch.zeros(experts.count, room, dtype=torch.int64)
        channels[owner, column] = channel
        places = []
        for (name, indices), own in zip(slices, units, strict=True):
            at = torch.searchsorted(held, own)
            columns = column[at]
            if name != DOWN:
                columns = _columns(experts, indices.cpu(), columns, room)
            width = room if name == DOWN or not experts.is_gated else 2 * room
            place = torch.full((experts.count, width), len(indices))
            place[owner[at], columns] = torch.arange(len(indices))
            places.append(place)
        return Table(
            channels.to(device), _rows(experts, channels).to(device), tuple(place.to(device) for place in places)
        )


def _units(experts: Experts, name: str, indices: Tensor) -> Tensor:  # [s] → [s], channels of all experts side by side
    if name == DOWN:
        return indices
    owner, row = indices // experts.rows, indices % experts.rows
    inner = row // 2 if experts.is_interleaved and experts.is_gated else row % experts.channels
    return owner * experts.channels + inner


def _columns(experts: Experts, indices: Tensor, columns: Tensor, room: int) -> Tensor:  # each [s]
    """Where rows of `up` are among the rows of a table, given the columns of their channels."""
    row = indices % experts.rows
    if not experts.is_gated:
        return columns
    return 2 * columns + row % 2 if experts.is_interleaved else columns + room * (row // experts.channels)


def _rows(experts: Experts, channels: Tensor) -> Tensor:  # [experts, k] → [experts, k or 2 k]
    if not experts.is_gated:
        return channels
    if experts.is_interleaved:
        return torch.stack([2 * channels, 2 * channels + 1], -1).flatten(1)
    return torch.cat([channels, experts.channels + channels], 1)
