"""Which slices can lie side by side in their base weights, in which order, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from s2ft.format.slices import Indices, Slice
from s2ft.layer.linears import linear_layer, weight_matrix, weight_of
from s2ft.selection.structure import read_structures
from s2ft.selection.units import Structure
from s2ft.training.obstacles import find_obstacles
from s2ft.training.ordering import channel_order, copermutation


@dataclass(frozen=True)
class Placement:
    """How the layout holds one module's slice."""

    module: str
    how: str  # "contiguous" | "gathered": in the weight, but not contiguous | "added": around the layer, as outside
    reason: str = ""  # why it is not contiguous


@dataclass(frozen=True)
class Move:
    """Channels of a layer (or of a norm over its output) that change places: positions ← sources."""

    module: nn.Module
    dim: int  # of the weight matrix [out_features, in_features]
    positions: Tensor  # [moved], int64
    sources: Tensor  # [moved], int64

    @torch.no_grad()
    def apply(self, back: bool = False) -> None:
        """Permutes the parameters, not their `data`: autograd then refuses graphs that were made in the other order."""
        to, source = (self.sources, self.positions) if back else (self.positions, self.sources)
        for tensor, dim in self._tensors():
            tensor.index_copy_(dim, to.to(tensor.device), tensor.index_select(dim, source.to(tensor.device)))

    def _tensors(self) -> Iterator[tuple[Tensor, int]]:
        weight = weight_of(self.module)
        yield (weight, 0) if weight.ndim == 1 else (weight_matrix(self.module), self.dim)
        bias = getattr(self.module, "bias", None)
        if bias is not None and self.dim == 0:
            yield bias, 0


class Plan:
    """How the layout can hold an adapter's slices, judged by modules and shapes.

    Whether the model computes the same in another order shows only when it runs (`training/probe.py`); `forbid` takes note of
    what does not.

    Args:
        model: The model, or one like it without values (device meta).
        slices: Module → its slice.
        live: Whether it is the model itself, with its values, and frozen.
    """

    def __init__(self, model: nn.Module, slices: Mapping[str, Slice], live: bool = True) -> None:
        self.slices = slices
        self.structures = read_structures(model).structures
        self.unmovable, self.unwritable, self.norms = find_obstacles(model, self.structures, live)
        self.forbid(filter(self._crossed, self.structures), "a slice is on the other side than the heads and channels")

    def _crossed(self, structure: Structure) -> bool:
        """Whether a slice is of what a projection reads rather than of the heads that it computes, or the other way round."""
        return any(p.module in self.slices and self.slices[p.module].side != p.side for p in structure.projections)

    def forbid(self, structures: Iterable[Structure], reason: str) -> None:
        """Keeps these structures in their order, for this reason."""
        self.unmovable |= {p.module: reason for structure in structures for p in structure.projections}

    def orders(self) -> dict[str, Indices]:
        """Module → position → channel of its sliced side, for those whose order changes."""
        orders: dict[str, Indices] = {}
        for structure in self.structures:
            modules = {projection.module for projection in structure.projections}
            if structure.kind == "linear" or not modules & set(self.slices) or modules & set(self.unmovable):
                continue
            order = copermutation(structure, self.slices)
            if (order == np.arange(len(order))).all():
                continue
            for p in structure.projections:
                size = sum(q.units * q.width for q in structure.projections if q.module == p.module)
                orders.setdefault(p.module, np.arange(size))[p.grid.ravel()] = channel_order(p, order)
        return orders

    def moves(self, model: nn.Module, orders: Mapping[str, Indices]) -> Iterator[Move]:
        """The moves that bring the base weights, and the norms over their outputs, into these orders."""
        sides = {p.module: p.side for structure in self.structures for p in structure.projections}
        for path, order in orders.items():
            moved = np.flatnonzero(order != np.arange(len(order)))
            for module in [model.get_submodule(path), *self.norms.get(path, [])]:
                base, dim = linear_layer(module) or module, 0 if sides[path] == "out" else 1
                yield Move(base, dim, torch.from_numpy(moved), torch.from_numpy(order[moved]))

    def channels(self, path: str, orders: Mapping[str, Indices]) -> Indices:  # [s]
        """Where the module's slice is, given these orders."""
        channels = self.slices[path].indices
        return np.argsort(orders[path])[channels] if path in orders else channels

    def placements(self, orders: Mapping[str, Indices]) -> tuple[Placement, ...]:
        """How each slice is held, given these orders."""
        return tuple(self._placement(path, orders) for path in self.slices)

    def _placement(self, path: str, orders: Mapping[str, Indices]) -> Placement:
        if path in self.unwritable:
            return Placement(path, "added", self.unwritable[path])
        channels = self.channels(path, orders)
        if channels.max() - channels.min() + 1 == len(channels):
            return Placement(path, "contiguous")
        reason = self.unmovable.get(path, "the chosen heads or channels cannot lie side by side")
        return Placement(path, "gathered", reason)


def planned(model: nn.Module, slices: Mapping[str, Slice]) -> tuple[Placement, ...]:
    """How the layout would hold these slices in a model like this one, which needs no values (device meta)."""
    plan = Plan(model, slices, live=False)
    return plan.placements(plan.orders())
