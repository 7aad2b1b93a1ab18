"""Heads and channels: where they lie in the layers of a coupled structure.

    attention heads          q, k, v  |  o         head h: rows of q (and of its group's k, v), columns of o
    FFN channels          gate, up    |  down      channel c: row c of gate and up, column c of down

Both sides of a bar can be permuted together without changing the output (S²FT paper, §3.1); a head or a channel is
therefore a unit that can be chosen by itself. Under grouped-query attention several query heads share a key-value head:
a query head is a unit on q and o, a whole group is the unit on k and v.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from s2ft.format.slices import Indices

Axes = tuple[tuple[int, int], ...]
"""How far apart things lie: (how many, channels from one to the next), from the outermost to the innermost."""


@dataclass(frozen=True)
class Projection:
    """One side of a structure inside one linear layer.

    Unit u owns the channels `offset + u * width` up to `offset + (u + 1) * width` of the module's `side`, unless `axes` says
    how its units, and then the channels of a unit, are spread over a layer that holds others in between.

    Example:
        >>> key = Projection("k_proj", "query_key_value", "out", units=3, width=2, offset=2, axes=((3, 6), (2, 1)))
        >>> key.grid.tolist()
        [[2, 3], [8, 9], [14, 15]]
        >>> key.units_of(np.array([3, 4, 14])).tolist()
        [0, 2]
    """

    name: str  # canonical, or the module's own name where no coupling is known
    module: str  # path of the linear layer in the model, or of the parameter that stacks those of experts
    side: str  # "in": columns of the weight (o, down); "out": rows (q, k, v, gate, up)
    units: int  # heads, key-value groups, or channels
    width: int  # channels of a unit: head_dim, or 1
    offset: int = 0  # where the projection starts in a fused layer
    axes: Axes = ()  # where its channels are not one after the other

    @property
    def grid(self) -> Indices:  # [units, width]
        """The channels of each unit, on the module's `side`."""
        axes = self.axes or ((self.units, self.width), (self.width, 1))
        steps = [np.arange(count, dtype=np.int64) * distance for count, distance in axes]
        grid: Indices = (self.offset + reduce(np.add.outer, steps)).reshape(self.units, self.width)
        return grid

    @property
    def channels(self) -> slice | Tensor:
        """The channels of all its units, as an index: a slice where they lie one after the other, else [units * width]."""
        if self.axes:
            return torch.from_numpy(self.grid.ravel())
        return slice(self.offset, self.offset + self.units * self.width)

    def channels_of(self, units: Indices) -> Indices:  # [n] → [n * width]
        """The channels of these units, in their order."""
        return self.grid[units].ravel()

    def units_of(self, channels: Indices) -> Indices:  # [n], of the module's side → [units that own any], ascending
        """The units that own any of these channels."""
        return np.flatnonzero(np.isin(self.grid, channels).any(1))


EXPERTS = "experts"  # the kind of a structure that is one of the experts stacked in a parameter


@dataclass(frozen=True)
class Structure:
    """A coupled structure: the projections whose units are permuted together."""

    kind: str  # "attention" | "mlp" | "experts" | "mixer" (Mamba, linear attention) | "linear" (no coupling known)
    path: str  # of the module that holds the projections; of stacked experts, with the expert's number behind it
    layer: int | None  # index of the block, where the path has one
    units: int  # query heads, or channels
    projections: tuple[Projection, ...]
    partial: str | None = None  # why not all its projections are here: its units cannot be permuted

    @property
    def key(self) -> str:
        """Names it: path and kind, since one module may hold an attention and an MLP."""
        return f"{self.path}:{self.kind}"

    @property
    def groups(self) -> int:
        """Key-value heads, each shared by `units // groups` query heads; `units` where nothing is shared."""
        shared = [p.units for p in self.projections if p.name in ("k_proj", "v_proj")]
        return shared[0] if shared else self.units

    def __getitem__(self, name: str) -> Projection:
        return next(projection for projection in self.projections if projection.name == name)


Target = tuple[Structure, Projection]
"""A projection that is trained, with its structure."""
