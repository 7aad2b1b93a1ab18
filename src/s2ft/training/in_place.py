"""`in_place(model)`: the layout for training at full speed, entered, used, and left again exactly.

    checkpoint order              in place
    W1 [gate, up]   W2 [down]     rows of W1 and columns of W2 in the order of `training/ordering.py`: chosen channels first;
    . . x . . x     . . x . . x   x x . . . .      the slice of W is a contiguous block that holds the trained values
                                                   (`layer/slot.py`), and no product is computed around it

Deltas, indices and files stay in checkpoint coordinates throughout; only base weights move, by copies that are undone by
copies. What cannot be laid out is named with its reason in `Layout.placements`, and runs as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from s2ft.common.errors import S2FTError
from s2ft.format.slices import Indices, Slice
from s2ft.layer.adapted import turns_of
from s2ft.layer.linear import S2FTLinear
from s2ft.layer.linears import linear_layer, weight_matrix
from s2ft.selection.structure import Structure, read_structures
from s2ft.training.lean import Patches, lean
from s2ft.training.obstacles import Norms, find_obstacles
from s2ft.training.ordering import channel_order, copermutation
from s2ft.training.probe import Probe


@dataclass(frozen=True)
class Placement:
    """How one module's slice is held in the layout."""

    module: str
    how: str  # "contiguous" | "gathered": in the weight, not side by side | "added": around the layer, as outside
    reason: str = ""  # why it is not contiguous


@dataclass(frozen=True)
class Move:
    """Channels of a layer (or of a norm over its output) that change places: position ← source."""

    module: nn.Module
    dim: int
    positions: Tensor
    sources: Tensor

    @torch.no_grad()
    def apply(self, back: bool = False) -> None:
        """Through the parameters, so that their versions count: autograd refuses a graph that was made in the other order."""
        to, source = (self.sources, self.positions) if back else (self.positions, self.sources)
        for tensor, dim in self._tensors():
            tensor.index_copy_(dim, to.to(tensor.device), tensor.index_select(dim, source.to(tensor.device)))

    def _tensors(self) -> Iterator[tuple[Tensor, int]]:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        yield (weight, 0) if weight.ndim == 1 else (weight_matrix(self.module), self.dim)
        bias = getattr(self.module, "bias", None)
        if bias is not None and self.dim == 0:
            yield bias, 0


@dataclass(eq=False)
class Layout:
    """A model in the in-place layout. Its state lies on the model's layers, so a copy of the model has one of its own."""

    adapter: str
    placements: tuple[Placement, ...] = ()
    _moves: list[Move] = field(default_factory=list)
    _layers: list[S2FTLinear] = field(default_factory=list)
    _patches: Patches | None = None
    _depth: int = 0  # of nested `in_place` blocks

    def leave(self) -> None:
        """The base weights as they were, bit for bit."""
        while self._layers:
            self._layers.pop().leave_layout()
        self.put_back()
        if self._patches is not None:
            self._patches.undo()
            self._patches = None

    def put_back(self) -> None:
        """The base weights in the checkpoint's order."""
        while self._moves:
            self._moves.pop().apply(back=True)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: nobody is inside an `in_place` block of theirs."""
        return {**self.__dict__, "_depth": 0}


@contextmanager
def in_place(model: nn.Module) -> Iterator[Layout]:
    """While inside, `model` trains its one active adapter in place, with activations that save the least (`training/lean.py`).

    The base weights are permuted and hold the trained values; saving an adapter or a checkpoint writes checkpoint
    coordinates as ever. What would read the base as it stands is refused inside: merging, unloading, adding or
    deleting adapters, other active adapters, `adapter_names`. `disable_adapter()` gives the base's own output.

    Entering again inside changes nothing; the outermost block leaves. A deep copy or pickle made inside is inside too,
    and leaves at the end of an `in_place` block of its own. Base weights are left as they were, bit for bit, whatever
    was raised.

    Raises:
        S2FTError: before anything is changed, if the model has no S²FT adapter, several active ones, or merged ones.

    Example:
        >>> import s2ft
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
        >>> model = get_peft_model(LlamaForCausalLM(config), s2ft.S2FTConfig(ratios=0.25))
        >>> with s2ft.in_place(model) as layout:
        ...     print([(place.module.split(".")[-1], place.how) for place in layout.placements])
        [('o_proj', 'contiguous'), ('down_proj', 'contiguous')]
    """
    turns = turns_of(model)
    with turns.alone():
        layout = _present(model) or enter(model)
        layout._depth += 1
    try:
        yield layout
    finally:
        with turns.alone():
            layout._depth -= 1
            if layout._depth == 0:
                layout.leave()


def enter(model: nn.Module, permute: bool = True, activations: bool = True) -> Layout:
    """What `in_place` enters; whoever calls this calls `leave()` too. Parts can be left out, to see what each is worth."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, S2FTLinear)}
    adapter = _only_adapter(layers)
    slices = {
        path: Slice.parse(layer.slice_text(adapter)) for path, layer in layers.items() if adapter in layer.s2ft_block
    }
    structures = read_structures(model).structures
    unmovable, unwritable, norms = find_obstacles(model, structures)
    if not permute:
        unmovable |= dict.fromkeys(slices, "not permuted, as asked")
    layout = Layout(adapter)
    try:
        orders = _permute(layout, model, structures, slices, unmovable, norms)
        layout.placements = _placements(slices, orders, unmovable, unwritable)
        slots = {place.module for place in layout.placements if place.how != "added"}
        for path, layer in layers.items():
            layout._layers.append(layer)
            layer.enter_layout(layout, _channels(slices[path], orders.get(path)) if path in slots else None)
        layout._patches = lean(model) if activations else None
    except BaseException:
        layout.leave()
        raise
    return layout


def _permute(
    layout: Layout,
    model: nn.Module,
    structures: list[Structure],
    slices: Mapping[str, Slice],
    unmovable: dict[str, str],  # gets what turns out not to be movable
    norms: Norms,
) -> dict[str, Indices]:
    """Brings the base weights into the layout's order, as far as the model computes the same in it; returns the orders."""
    orders = _module_orders(structures, slices, unmovable)
    if not orders:
        return orders
    moved = [s for s in structures if any(p.module in orders for p in s.projections)]
    try:
        probe = Probe(model, {structure.path for structure in moved})
    except Exception as error:
        unmovable |= _because(moved, f"the model cannot be run on its dummy input to check the order ({error})")
        return {}
    if probe.unreached:
        unknown = [structure for structure in moved if structure.path in probe.unreached]
        unmovable |= _because(unknown, "the model's dummy input never gets there, so its order cannot be checked")
        orders = _module_orders(structures, slices, unmovable)
    _move_all(layout, model, structures, orders, norms)
    differing = probe.differing()
    if differing:
        layout.put_back()
        wrong = [structure for structure in moved if structure.path in differing]
        unmovable |= _because(wrong, "it computes something else when its heads or channels change places")
        orders = _module_orders(structures, slices, unmovable)
        _move_all(layout, model, structures, orders, norms)
    if orders and probe.whole_differs():
        layout.put_back()
        asked = [structure for structure in moved if structure.path not in probe.unreached]
        unmovable |= _because(asked, "the model computes something else when heads or channels change places")
        return {}
    return orders


def _because(structures: list[Structure], reason: str) -> dict[str, str]:
    return {projection.module: reason for structure in structures for projection in structure.projections}


def _move_all(
    layout: Layout, model: nn.Module, structures: list[Structure], orders: Mapping[str, Indices], norms: Norms
) -> None:
    sides = {projection.module: projection.side for structure in structures for projection in structure.projections}
    for path, order in orders.items():
        for module in [model.get_submodule(path), *norms.get(path, [])]:
            _move(layout, module, order, 0 if sides[path] == "out" else 1)


def planned(model: nn.Module, slices: Mapping[str, Slice]) -> tuple[Placement, ...]:
    """How the layout would hold these slices in a model like this one, which needs no values (device meta).

    Says what modules and shapes tell; only a model that runs shows whether it computes the same in another order.
    """
    structures = read_structures(model).structures
    unmovable, unwritable, _ = find_obstacles(model, structures, live=False)
    return _placements(slices, _module_orders(structures, slices, unmovable), unmovable, unwritable)


def _present(model: nn.Module) -> Layout | None:
    layouts = (m.layout for m in model.modules() if isinstance(m, S2FTLinear) and m.layout is not None)
    return next(layouts, None)


def _only_adapter(layers: Mapping[str, S2FTLinear]) -> str:
    if not layers:
        raise S2FTError("the model has no S²FT adapter; in_place(model) lays out the slices of one")
    active = sorted({name for layer in layers.values() for name in layer.active_adapters if name in layer.s2ft_block})
    for layer in layers.values():
        layer.require_own("in_place(model)")
    if any(layer.is_switched for layer in layers.values()):
        raise S2FTError("the model is switched to its base; call `model.set_adapter(name)` before in_place(model)")
    if len(active) != 1:
        raise S2FTError(f"in_place(model) trains one active adapter; active are: {', '.join(active) or 'none'}")
    return active[0]


def _move(layout: Layout, module: nn.Module, order: Indices, dim: int) -> None:
    base = linear_layer(module) or module
    moved = np.flatnonzero(order != np.arange(len(order)))
    move = Move(base, dim, torch.from_numpy(moved), torch.from_numpy(order[moved]))
    move.apply()
    layout._moves.append(move)


def _channels(trained: Slice, order: Indices | None) -> Tensor:  # [s]: where the slice's channels are in the layout
    return torch.from_numpy(trained.indices if order is None else np.argsort(order)[trained.indices])


def _module_orders(
    structures: list[Structure], slices: Mapping[str, Slice], unmovable: Mapping[str, str]
) -> dict[str, Indices]:
    """Module → position → channel of its sliced side, for those whose order changes."""
    orders: dict[str, Indices] = {}
    for structure in structures:
        modules = {projection.module for projection in structure.projections}
        if structure.kind == "linear" or not modules & set(slices) or modules & set(unmovable):
            continue
        order = copermutation(structure, slices)
        if (order == np.arange(len(order))).all():
            continue
        for p in structure.projections:
            size = sum(q.units * q.width for q in structure.projections if q.module == p.module)
            orders.setdefault(p.module, np.arange(size))[p.offset : p.offset + p.units * p.width] = (
                p.offset + channel_order(p, order)
            )
    return orders


def _placements(
    slices: Mapping[str, Slice],
    orders: Mapping[str, Indices],
    unmovable: Mapping[str, str],  # module of a structure → why it must not be permuted
    unwritable: Mapping[str, str],  # module → why its weight must not be written to
) -> tuple[Placement, ...]:
    return tuple(_placement(path, trained, orders, unmovable, unwritable) for path, trained in slices.items())


def _placement(
    path: str,
    trained: Slice,
    orders: Mapping[str, Indices],
    unmovable: Mapping[str, str],
    unwritable: Mapping[str, str],
) -> Placement:
    if path in unwritable:
        return Placement(path, "added", unwritable[path])
    positions = trained.indices if path not in orders else np.argsort(orders[path])[trained.indices]
    if positions.max() - positions.min() + 1 == len(positions):
        return Placement(path, "contiguous")
    reason = unmovable.get(path, "the chosen heads or channels cannot lie side by side")
    return Placement(path, "gathered", reason)
