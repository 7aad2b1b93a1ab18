"""Several adapters' slices of one layer as one table, kept until the batch's adapters change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from s2ft.common.errors import S2FTError
from s2ft.layer.backprop import stamp


class MixedBatch(list[str]):
    """The name of each row's adapter, shared by all layers, with what they prepare for it.

    Example:
        >>> batch = MixedBatch(["b", "__base__", "a", "b"])
        >>> batch.distinct, batch.of_row.tolist()
        (('__base__', 'a', 'b'), [2, 0, 1, 2])
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(names)
        self.distinct = tuple(sorted(set(self)))
        place = {name: number for number, name in enumerate(self.distinct)}
        self.of_row = torch.tensor([place[name] for name in self], dtype=torch.int64)  # [rows], into `distinct`
        self.packs: dict[tuple[nn.Module, torch.dtype], list[Pack]] = {}
        self.steps: dict[tuple[nn.Module, torch.dtype], list[Step]] = {}

    def __deepcopy__(self, memo: Any) -> MixedBatch:
        return MixedBatch(self)


@dataclass(frozen=True, eq=False)
class LooseSlice:
    """An adapter's slice of one layer that is no part of the model (see `tuner/pool.py`); as `S2FTBlock`."""

    side: str
    indices: Tensor  # [s], int64
    weight: Tensor  # [out_features, s] on the input side, [s, in_features] on the output side


@dataclass(frozen=True, eq=False)
class Pack:
    """One side of several adapters of a layer, one after the other."""

    side: str
    table: Tensor  # [channels + 1, out_features or in_features]; the last row is zero
    channels: Tensor  # [channels + 1], each row's channel of the layer; the last is 0; on the CPU
    starts: Tensor  # [adapters], each one's first row; on the CPU
    counts: Tensor  # [adapters], how many rows it has; on the CPU


Step = tuple[Callable[..., Tensor], Pack, Any]  # how to add, what, and by which plan


def forget(layer: nn.Module) -> None:
    """Lets go of the layer's table; it is made anew when needed."""
    _tables.pop(layer, None)


def find_slice(layer: nn.Module, name: str) -> Any:  # S2FTBlock | LooseSlice | None
    """The adapter's slice of this layer: the model's own, or from a pool."""
    blocks: nn.ModuleDict = layer.s2ft_block  # type: ignore[assignment]
    return blocks[name] if name in blocks else layer.pooled.get(name)  # type: ignore[operator, union-attr]


_tables: WeakKeyDictionary[nn.Module, tuple[Any, list[Pack]]] = WeakKeyDictionary()


def packed(layer: nn.Module, batch: MixedBatch, like: Tensor) -> list[Pack]:
    """The layer's table for this batch: what the batch has, else what the layer still holds, else a new one."""
    kept = batch.packs.get((layer, like.dtype))
    if kept is None:
        stamp = (like.dtype, like.device, [_stamp(find_slice(layer, name), name) for name in batch.distinct])
        table = _tables.get(layer)
        if table is None or table[0] != stamp:
            forget(layer)  # before the new one: two need not fit
            with torch.no_grad():
                table = _tables[layer] = (stamp, pack_slices(layer, batch, like))
        kept = batch.packs[layer, like.dtype] = table[1]
    return kept


def _stamp(found: Any, name: str) -> Any:
    """Differs when the adapter's slice does."""
    if found is None:
        return name
    return name, _Identity(found.weight), stamp(found.weight)


class _Identity:
    """Equals that of the same tensor. Holds it weakly: a deleted adapter's memory is freed."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = ref(tensor)

    def __eq__(self, other: object) -> bool:
        mine = self._tensor()
        return isinstance(other, _Identity) and mine is not None and mine is other._tensor()


def pack_slices(layer: nn.Module, batch: MixedBatch, like: Tensor) -> list[Pack]:
    found = [find_slice(layer, name) for name in batch.distinct]
    sides = sorted({one.side for one in found if one is not None})
    return [_pack_side(side, [one if one and one.side == side else None for one in found], like) for side in sides]


def _pack_side(side: str, found: list[Any], like: Tensor) -> Pack:
    slices = [one for one in found if one is not None]
    widths = {one.weight.shape[0 if side == "in" else 1] for one in slices}
    if len(widths) > 1:  # the readers see to it; a table of other widths would be read past its end
        raise S2FTError(f"slices of one layer have {', '.join(map(str, sorted(widths)))} features on their other side")
    deltas = [one.weight.T if side == "in" else one.weight for one in slices]
    rows = [delta.to(like.device, like.dtype) for delta in deltas]
    channels = [one.indices.cpu() for one in slices]
    counts = torch.tensor([0 if one is None else len(one.indices) for one in found])
    zero = rows[0].new_zeros(1, rows[0].shape[1])
    return Pack(
        side, torch.cat([*rows, zero]), torch.cat([*channels, counts.new_zeros(1)]), counts.cumsum(0) - counts, counts
    )
