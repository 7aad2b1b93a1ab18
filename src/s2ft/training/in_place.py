"""`in_place(model)`: the layout for training at full speed.

    checkpoint order              in place
    W1 [gate, up]   W2 [down]     rows of W1 and columns of W2 in the order of `training/ordering.py`: chosen channels first;
    . . x . . x     . . x . . x   x x . . . .      the slice of W is a contiguous block that holds the trained values
                                                   (`layer/slot.py`), and no product is computed around it

Deltas, indices and files keep the checkpoint's order; only base weights are permuted, and restored by copies. What cannot be
laid out is listed with its reason in `Layout.placements`, and runs as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from s2ft.common.errors import S2FTError, first_line
from s2ft.format.slices import Indices
from s2ft.layer.adapted import adapted_layers, require_own, turns_of
from s2ft.layer.linear import S2FTLinear, sliced_layers
from s2ft.layer.linears import features, linear_layer
from s2ft.selection.units import Structure
from s2ft.training.lean import Patches, lean
from s2ft.training.plan import Move, Placement, Plan
from s2ft.training.probe import Probe, filled


@dataclass(eq=False)
class Layout:
    """A model in the in-place layout. The model's layers refer to it, so a copy of the model has its own."""

    adapter: str  # that trains
    placements: tuple[Placement, ...] = ()
    moves: list[Move] = field(default_factory=list)  # that were made, in their order
    layers: list[S2FTLinear] = field(default_factory=list)  # that are laid out
    patches: Patches = field(default_factory=Patches)  # lean activations
    depth: int = 0  # of nested `in_place` blocks

    def move(self, moves: Iterable[Move]) -> None:
        """Permutes base weights."""
        for move in moves:
            move.apply()
            self.moves.append(move)

    def put_back(self) -> None:
        """Undoes all moves: base weights are in the checkpoint's order again."""
        while self.moves:
            self.moves.pop().apply(back=True)

    def leave(self) -> None:
        """Leaves the layout: base weights are as they were before, bit for bit.

        Raises:
            S2FTError: at the end, if that could not be, as where they were sharded inside.
        """
        layers, self.layers = self.layers, []
        try:
            with ExitStack() as undone:  # the last first, and all of them, also if one raises
                for undo in (self.patches.undo, self.put_back, *(layer.leave_layout for layer in layers)):
                    undone.callback(undo)
        except Exception as error:
            raise S2FTError(
                f"base weights could not all be restored, so load the model anew: {first_line(error)}"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start outside of any `in_place` block."""
        return {**self.__dict__, "depth": 0}


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
        layout.depth += 1
    try:
        yield layout
    finally:
        with turns.alone():
            layout.depth -= 1
            if layout.depth == 0:
                layout.leave()


def enter(model: nn.Module, permute: bool = True, activations: bool = True) -> Layout:
    """Enters the layout, as `in_place` does; the caller leaves it by `leave()`.

    Args:
        model: As for `in_place`.
        permute: Permute heads and channels; otherwise few slices are contiguous.
        activations: Replace modules that save too much for backward.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, S2FTLinear)}
    adapter = _only_adapter(model, layers)
    slices = {path: layer.block(adapter).trained for path, layer in sliced_layers(model, adapter).items()}
    plan = Plan(model, slices)
    if not permute:
        plan.unmovable |= dict.fromkeys(slices, "not permuted, as asked")
    layout = Layout(adapter)
    try:
        orders = _permute(layout, model, plan)
        layout.placements = plan.placements(orders)
        in_weight = {place.module for place in layout.placements if place.how != "added"}
        for path, layer in layers.items():
            layout.layers.append(layer)
            channels = torch.from_numpy(plan.channels(path, orders)) if path in in_weight else None
            layer.enter_layout(layout, channels)
        if activations:
            layout.patches = lean(model)
    except BaseException:
        layout.leave()
        raise
    return layout


def _permute(layout: Layout, model: nn.Module, plan: Plan) -> dict[str, Indices]:
    """Permutes the base weights as planned, where the model computes the same afterwards; returns the orders."""
    orders = plan.orders()
    moved = [s for s in plan.structures if any(p.module in orders for p in s.projections)]
    if not moved:
        return {}
    with filled(model, {p.module for structure in moved for p in structure.projections}) as any_filled:
        orders = _permute_where_same(layout, model, plan, moved)
        if any_filled:
            layout.put_back()
    if any_filled:
        layout.move(plan.moves(model, orders))
    return orders


def _permute_where_same(layout: Layout, model: nn.Module, plan: Plan, moved: list[Structure]) -> dict[str, Indices]:
    """Permutes these structures, and takes back those that show in what the model computes."""
    try:
        alone = {s.path: _channels(model, s) for s in moved if s.kind == "mlp"}
        probe = Probe(model, {structure.path for structure in moved}, alone)
    except Exception as error:
        plan.forbid(moved, f"the model cannot be run on its dummy input to check the order ({error})")
        return {}
    unknown = [structure for structure in moved if structure.path in probe.unreached]
    plan.forbid(unknown, "no dummy input gets there, so its order cannot be checked")
    orders = plan.orders()
    layout.move(plan.moves(model, orders))
    if differing := probe.differing():
        layout.put_back()
        wrong = [structure for structure in moved if structure.path in differing]
        plan.forbid(wrong, "it computes something else when its heads or channels change places")
        orders = plan.orders()
        layout.move(plan.moves(model, orders))
    if orders and probe.whole_differs():
        layout.put_back()
        reached = [structure for structure in moved if structure.path not in probe.unreached]
        plan.forbid(reached, "the model computes something else when heads or channels change places")
        return {}
    return orders


def _channels(model: nn.Module, structure: Structure) -> int:
    """Of what the structure reads."""
    layer = linear_layer(model.get_submodule(structure.projections[0].module))
    assert layer is not None
    return features(layer)[0]


def _present(model: nn.Module) -> Layout | None:
    """The layout that the model is already in."""
    layouts: Iterator[Layout] = (layer.layout for layer in adapted_layers(model) if layer.layout is not None)
    return next(layouts, None)


def _only_adapter(model: nn.Module, layers: Mapping[str, S2FTLinear]) -> str:
    if not layers:
        raise S2FTError("the model has no S²FT adapter; in_place(model) lays out the slices of one")
    require_own(model, "in_place(model)")
    if any(layer.is_switched for layer in layers.values()):
        raise S2FTError("the model is switched to its base; call `model.set_adapter(name)` before in_place(model)")
    active: list[str] = sorted({n for layer in layers.values() for n in layer.active_adapters if n in layer.s2ft_block})
    if len(active) != 1:
        raise S2FTError(f"in_place(model) trains one active adapter; active are: {', '.join(active) or 'none'}")
    return active[0]
