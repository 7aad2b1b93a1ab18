"""The slices of several adapters of one layer as one table, kept until the batch's adapters change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from s2ft.common.errors import S2FTError
from s2ft.layer.backprop import stamp


def wrong_count(names: int, rows: int) -> str:
    """PEFT's words for a list of names that is longer or shorter than the batch."""
    return (
        f"Length of `adapter_names` should be the same as the number of inputs, but got {names} and {rows} respectively"
    )


class MixedBatch(list[str]):
    """The name of each row's adapter, and what the layers have prepared for this batch.

    Example:
        >>> batch = MixedBatch(["b", "__base__", "a", "b"])
        >>> batch.distinct, batch.of_row.tolist()
        (('b', '__base__', 'a'), [0, 1, 2, 0])
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(names)
        self.distinct = tuple(dict.fromkeys(self))
        self.of_row = self.places(self.distinct)  # [rows], int64, into `distinct`
        self.packs: dict[tuple[nn.Module, torch.dtype], list[Pack]] = {}
        self.steps: dict[tuple[nn.Module, torch.dtype, torch.Size], list[Step]] = {}  # by the shape of the output, too
        self.length: int | None = None  # where rows are flattened to [rows * length, features]

    def flattened(self, length: int) -> MixedBatch:
        """The same batch for a layer that sees each row as `length` rows of its own; shares what is prepared."""
        other = copy(self)
        other.length = length
        return other

    def unflatten(self, tokens: Tensor) -> Tensor:  # [rows * length, features] → [rows, length, features]
        """As it was before the model flattened it; as it is where it did not."""
        return tokens if self.length is None else tokens.unflatten(0, (len(self), self.length))

    def places(self, names: tuple[str, ...]) -> Tensor:  # [rows], int64
        """Where each row's adapter is in `names`."""
        place = {name: number for number, name in enumerate(names)}
        return torch.tensor([place[name] for name in self], dtype=torch.int64)

    def __deepcopy__(self, memo: Any) -> MixedBatch:
        return MixedBatch(self)


@dataclass(frozen=True, eq=False)
class LooseSlice:
    """An adapter's slice of one layer, like an `S2FTBlock`, but not part of the model (see `tuner/pool.py`)."""

    side: str
    indices: Tensor  # [s], int64
    weight: Tensor  # [out_features, s] on the input side, [s, in_features] on the output side


@dataclass(frozen=True, eq=False)
class Pack:
    """The slices of several adapters on one side of a layer, one after the other; those with fewer channels come first."""

    names: tuple[str, ...]  # the adapters, in the order of `starts` and `counts`
    side: str
    table: Tensor  # [rows + 1, out_features or in_features]; the last row is zero
    channels: Tensor  # [rows + 1], int64, on the CPU: the layer's channel that each row is of; 0 for the last
    starts: Tensor  # [adapters], int64, on the CPU: the first row of each adapter
    counts: Tensor  # [adapters], int64, on the CPU: how many rows it has


Step = tuple[Callable[..., Tensor], Pack, Any]  # how to add, what, and by which plan


def forget(layer: nn.Module) -> None:
    """Drops the layer's table; a new one is made when needed."""
    _tables.pop(layer, None)


def find_slice(layer: Any, name: str) -> Any:  # S2FTBlock | LooseSlice | None
    """The adapter's slice of this layer, from the model or from a pool."""
    return layer.s2ft_block[name] if name in layer.s2ft_block else layer.pooled.get(name)


_tables: WeakKeyDictionary[nn.Module, tuple[Any, list[Pack]]] = WeakKeyDictionary()


def packed(layer: nn.Module, batch: MixedBatch, like: Tensor) -> list[Pack]:
    """The tables for this batch: those that the batch has, else those that the layer still has, else new ones."""
    kept = batch.packs.get((layer, like.dtype))
    if kept is None:
        slices = {name: _stamp(find_slice(layer, name)) for name in batch.distinct}  # in any order
        stamp = (like.dtype, like.device, slices)
        table = _tables.get(layer)
        if table is None or table[0] != stamp:
            forget(layer)  # first, since the memory may not be enough for two
            with torch.no_grad():
                table = _tables[layer] = (stamp, pack_slices(layer, batch, like))
        kept = batch.packs[layer, like.dtype] = table[1]
    return kept


def _stamp(found: Any) -> Any:
    """A value that changes when the adapter's slice does."""
    return None if found is None else (_Identity(found.weight), stamp(found.weight))


class _Identity:
    """Equal for the same tensor. Refers to it weakly, so that the memory of a deleted adapter is freed."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = ref(tensor)

    def __eq__(self, other: object) -> bool:
        mine = self._tensor()
        return isinstance(other, _Identity) and mine is not None and mine is other._tensor()


def pack_slices(layer: nn.Module, batch: MixedBatch, like: Tensor) -> list[Pack]:
    """The slices of the batch's adapters as new tables, one for each side, on the device and in the dtype of `like`."""
    found = {name: find_slice(layer, name) for name in batch.distinct}
    sides = sorted({one.side for one in found.values() if one is not None})
    return [_pack_side(side, found, like) for side in sides]


def _pack_side(side: str, found: dict[str, Any], like: Tensor) -> Pack:
    slices = {name: one for name, one in found.items() if one is not None and one.side == side}
    widths = {one.weight.shape[0 if side == "in" else 1] for one in slices.values()}
    if len(widths) > 1:  # readers of adapters check it; here it would be read past the table's end
        raise S2FTError(f"slices of one layer have {', '.join(map(str, sorted(widths)))} features on their other side")
    counts = {name: len(slices[name].indices) if name in slices else 0 for name in found}
    order = sorted(slices, key=counts.__getitem__)
    deltas = [slices[name].weight.T if side == "in" else slices[name].weight for name in order]
    rows = [delta.to(like.device, like.dtype) for delta in deltas]
    channels = [slices[name].indices.cpu() for name in order]
    ends = dict(zip(order, accumulate(counts[name] for name in order), strict=True))
    return Pack(
        tuple(found),
        side,
        torch.cat([*rows, rows[0].new_zeros(1, rows[0].shape[1])]),
        torch.cat([*channels, channels[0].new_zeros(1)]),
        torch.tensor([ends.get(name, 0) - counts[name] for name in found]),
        torch.tensor(list(counts.values())),
    )
