"""The state of an adapted layer: what it computes, and what its base weight holds.

    ordinary    y = base(x) + the active adapters' slices                  PEFT's way
    merged      y = base(x)                                                base holds W + ΔW of every merged adapter
    switched    y = base(x)                                                base holds W + ΔW of one adapter, or W of none
    disabled    y = base(x)                                                base holds W, for as long as that lasts
    in place    y = base(x)                                                base holds W + ΔW of the adapter that trains

What the weight should hold follows from the layer's state. After every change of the state, `settle` makes it so
(`layer/base_weight.py`); in place, the forward pass does (`layer/slot.py`). Whatever needs the weight's own values calls
`require_own`. A layer that has no slice of an adapter still follows its state, and runs its base. All layers of a model share
one `Shared`, so that they agree although PEFT asks them one by one.

The forward pass of a switched model reads one flag, the same for every adapter and for none: a compiled model is compiled once.
People call `switch` in `tuner/switching.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import nn

from s2ft.common.errors import S2FTError, raise_together
from s2ft.format.slices import all_finite
from s2ft.layer.base_weight import BaseWeight, shared_weights
from s2ft.layer.block import S2FTBlock
from s2ft.layer.columns import add_delta, take_slice
from s2ft.layer.linears import NO_VALUES, is_quantised, weight_of, why_not_plain
from s2ft.layer.sharding import everywhere, gathered, why_not_writable, written
from s2ft.layer.token_rows import rows_aside
from s2ft.layer.turns import Turns

_STATE = ("merged_adapters", "_disable_adapters", "is_switched", "switched_to")  # decides what the weight holds


class Shared:
    """What the layers of one model have in common."""

    def __init__(self) -> None:
        self.layers: WeakSet[AdaptedLayer] = WeakSet()
        self.turns = Turns()

    def __reduce__(self) -> tuple[type[Shared], tuple[()]]:
        """Copies and pickles start empty; copied layers join them."""
        return Shared, ()

    @property
    def adapters(self) -> list[str]:
        """The names of the model's adapters, sorted."""
        return sorted({name for layer in self.layers for name in layer.s2ft_block})


class AdaptedLayer(BaseTunerLayer):
    """The part of `S2FTLinear` that PEFT's calls change: which adapters are active, merged, switched to, or disabled."""

    is_switched = False
    switched_to: str | None = None
    layout: Any = None  # the model's Layout, inside `in_place`

    base_layer: nn.Module
    s2ft_block: nn.ModuleDict
    training: bool
    merged_adapters: list[str]  # in the order of merging; also those that have no slice of this layer
    shared: Shared
    base_weight: BaseWeight

    def join(self, shared: Shared) -> None:
        """Becomes one of a model's layers, in the state of the others."""
        peer = next(iter(shared.layers), None)
        if peer is not None:
            self._active_adapter, self._disable_adapters = peer.active_adapter, peer.disable_adapters
            self.merged_adapters = list(peer.merged_adapters)
            self.is_switched, self.switched_to = peer.is_switched, peer.switched_to
        self.shared = shared
        shared.layers.add(self)

    @property
    def standing(self) -> tuple[str, ...]:
        """The adapters that the base weight should hold."""
        if self.disable_adapters:
            return ()
        return tuple(self.merged_adapters) or (() if self.switched_to is None else (self.switched_to,))

    def settle(self) -> None:
        """Makes the base weight hold what it should; if anything is raised, it holds its own values, or those of before."""
        if self.standing != self.base_weight.adapters:
            slices = {name: self.block(name) if name in self.s2ft_block else None for name in self.standing}
            with self._onloaded():
                self._refuse_to_lose(any(slices.values()))
                self.base_weight.hold(self.get_base_layer(), slices)

    def take_out(self) -> None:
        """Restores the base weight, until `settle` is called again."""
        if self.base_weight.adapters or not self.base_weight.is_own:
            with self._onloaded():
                self._refuse_to_lose()
                self.base_weight.restore(self.get_base_layer())

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """Runs the base layer by itself; unlike `enable_adapters`, touches neither the weight nor what trains."""
        before, self._disable_adapters = self._disable_adapters, True
        try:
            yield
        finally:
            self._disable_adapters = before

    def _onloaded(self) -> AbstractContextManager[Any]:
        """With the base weight's values here, where accelerate has offloaded them; around merging, PEFT has brought them."""
        is_away = hasattr(self.get_base_layer(), "_hf_hook") and self.weight.is_meta
        return onload_layer(self) if is_away else nullcontext()

    def _refuse_to_lose(self, adds: bool = False) -> None:
        """Raises `S2FTError` before values are written to device meta; `adds`: slices are to be added."""
        linear = self.get_base_layer()
        if weight_of(linear).is_meta and not is_quantised(linear) and (adds or not self.base_weight.is_own):
            raise S2FTError(f"the base layer's weight {NO_VALUES}; bring it back before its adapters are changed")

    # ---- merging -----------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the active (or named) adapters' slices to the base weight; if adapters are disabled, once they are enabled.

        Args:
            safe_merge: Check that the new values are finite.
            adapter_names: The adapters to merge; None: the active ones.

        Raises:
            S2FTError: if they cannot be merged; the weight is what it was before.
        """
        names = list(dict.fromkeys(check_adapters_to_merge(self, adapter_names)))
        self.refuse_merging(names)
        with self._onloaded(), all_or_nothing([self]):
            self.merged_adapters = [*self.merged_adapters, *names]
            self.settle()
            broken = [name for name in names if safe_merge and not self._merges_finite(name)]
            if broken:
                raise S2FTError(f"NaNs detected in the merged weights. The adapter {broken[0]} seems to be broken")

    def refuse_merging(self, names: Sequence[str]) -> None:
        """Raises `S2FTError` where these adapters cannot be merged."""
        self.require_own("merging", allowed=["merged"])
        elsewhere = [name for name in names if name not in self.s2ft_block]
        if elsewhere:  # `shared.adapters` goes through all layers
            raise_together(not_loaded(elsewhere, self.shared.adapters))
        if problem := self.why_unwritable(names):
            raise S2FTError(f"the layer cannot be merged into: {problem}")

    def why_unwritable(self, names: Sequence[str]) -> str | None:
        """Why the base weight cannot take these adapters' slices; a quantised one need not, they are added beside it."""
        linear = self.get_base_layer()
        if is_quantised(linear) or not any(name in self.s2ft_block for name in names):
            return None
        if weight_of(linear).is_meta and not hasattr(linear, "_hf_hook"):  # PEFT brings back what has the hook itself
            return f"its weight {NO_VALUES}"
        reason = why_not_writable(linear)
        return f"its weight {reason}; s2ft trains on it, but writes into plain weights only" if reason else None

    def _merges_finite(self, name: str) -> bool:
        """Whether the slice's channels are finite with the adapter in them, which a disabled one will be later."""
        if name not in self.s2ft_block:
            return True
        block, linear = self.block(name), self.get_base_layer()
        delta = gathered(block.weight).detach()
        if self.base_weight.is_beside:
            return all_finite(delta)
        with written(linear, "merging") as part:
            device = part.matrix.device
            channels, delta = part.of(block.dim, block.indices.to(device), delta.to(device))
            values = take_slice(part.matrix, block.dim, channels)
            if name not in self.base_weight.adapters:
                values = add_delta(values, delta)
        return everywhere(linear, all_finite(values))

    def unmerge(self) -> None:
        """Restores the base weight, bit for bit."""
        with all_or_nothing([self]):
            self.merged_adapters = []
            self.settle()

    # ---- PEFT's own calls --------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT; ends the switched state."""
        names = list(dict.fromkeys([adapter_names] if isinstance(adapter_names, str) else adapter_names))
        self.refuse_beside_layout(names)
        end_switch([self])
        self._activate(names, inference_mode)

    def refuse_beside_layout(self, names: Sequence[str]) -> None:
        """Raises `S2FTError` inside `in_place`, unless `names` are the adapter that it trains."""
        if self.layout is not None and list(names) != [self.layout.adapter]:
            raise S2FTError(
                f"inside `s2ft.in_place(model)` its adapter {self.layout.adapter!r} is active; "
                f"asked for: {', '.join(map(repr, names)) or 'none'}. Leave it first"
            )

    def _activate(self, names: list[str], inference_mode: bool = False) -> None:
        super().set_adapter(names, inference_mode=inference_mode)
        for name in names:
            if name in self.s2ft_block and self.block(name).is_parked:
                self._move_adapter_to_device_of_base_layer(name)
                self.block(name).is_parked = False

    def enable_adapters(self, enabled: bool) -> None:
        """As in PEFT; while adapters are disabled, the base weight has its own values."""
        with all_or_nothing([self]):
            if not self.is_switched:
                super().enable_adapters(enabled)
            self._disable_adapters = not enabled
            self.settle()

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; a layer that is switched to the adapter is switched to its base.

        If it was the only active adapter, another of the model's becomes active, whether it has a slice of this layer or not.
        """
        self.require_own(f"deleting the adapter {adapter_name!r}", allowed=["merged", "switched"])
        if adapter_name in self.merged_adapters:
            raise S2FTError(f"the adapter {adapter_name!r} is merged; call `unmerge_adapter()` before deleting it")
        if self.switched_to == adapter_name:
            self.switched_to = None
            self.settle()
        if adapter_name in self.active_adapters:
            self._activate(self._successors(adapter_name))
        super().delete_adapter(adapter_name)

    def _successors(self, adapter_name: str) -> list[str]:
        """The adapters that are active once this one is deleted: PEFT's rule, applied to the model as a whole."""
        others = [name for name in self.active_adapters if name != adapter_name]
        if not others:
            others = [name for name in self.shared.adapters if name != adapter_name][:1]
            if others:
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {others[0]}.",
                    stacklevel=4,
                )
        return others

    # ---- what a state does not allow ---------------------------------------------------------------------------------

    def why_not_own(self, what: str, allowed: Collection[str] = ()) -> str | None:
        """Why `what`, which needs the base weight's own values, is not possible; None if it is.

        Args:
            what: The subject of the message, such as "merging".
            allowed: States in which it is possible nevertheless: "merged", "switched".
        """
        if self.layout is not None:
            return (
                f"{what} is not possible inside `s2ft.in_place(model)`, where base weights are permuted; leave it first"
            )
        if self.switched_to is not None and "switched" not in allowed:
            return (
                f"{what} is not possible while the model is switched to {self.switched_to!r}; call "
                "`s2ft.switch(model, None)` or `model.set_adapter(name)` first"
            )
        if self.merged_adapters and "merged" not in allowed:
            return (
                f"{what} is not possible while adapters {', '.join(self.merged_adapters)} are merged into the base; "
                "call `unmerge_adapter()` first"
            )
        return None

    def require_own(self, what: str, allowed: Collection[str] = ()) -> None:
        """Raises `S2FTError` if `what` is not possible; see `why_not_own`."""
        raise_together(filter(None, [self.why_not_own(what, allowed)]))

    def check_switched_forward(self, adapter_names: Sequence[str] | None) -> None:
        """Raises `S2FTError` for training, and for a mixed batch while the base weight holds an adapter."""
        if adapter_names is not None:
            self.require_own("`adapter_names`", allowed=["merged"])
        if self.training and torch.is_grad_enabled():
            raise S2FTError(
                f"the model is switched to {self.switched_to!r}, and its adapters do not train: call "
                "`model.set_adapter(name)` to train, or `model.eval()` to run it"
            )

    def block(self, adapter_name: str) -> S2FTBlock:
        """The adapter's slice of this layer."""
        block = self.s2ft_block[adapter_name]
        assert isinstance(block, S2FTBlock)
        return block


def not_loaded(names: Iterable[str], loaded: Collection[str]) -> Iterator[str]:
    """A problem for each name that is not a loaded adapter's."""
    for name in names:
        if name not in loaded:
            yield f"adapter {name!r} is not loaded; loaded are {', '.join(map(repr, loaded)) or 'none'}"


def adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """The model's S²FT layers, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, AdaptedLayer)]


def turns_of(model: nn.Module) -> Turns:
    """The lock of the model; a new one if it has no S²FT layers."""
    return next((layer.shared.turns for layer in adapted_layers(model)), Turns())


def mark_shared(model: nn.Module) -> None:
    """Tells each layer whether another module uses its weight too; called before adapters are written into weights."""
    shared = shared_weights(model)
    for layer in adapted_layers(model):
        if layer.base_weight.is_own:
            linear = layer.get_base_layer()
            layer.base_weight.is_shared = why_not_plain(linear) is None and layer.weight.data_ptr() in shared


def standing_in_all(layers: Sequence[AdaptedLayer]) -> list[str]:
    """The adapters that the base weight of every layer should hold."""
    first = layers[0].standing if layers else ()
    return [name for name in first if all(name in layer.standing for layer in layers)]


@contextmanager
def all_or_nothing(layers: Sequence[AdaptedLayer]) -> Iterator[None]:
    """If the block raises, all layers are merged, disabled and switched as they were before."""
    before = [tuple(getattr(layer, name) for name in _STATE) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, values in zip(layers, before, strict=True):
            for name, value in zip(_STATE, values, strict=True):
                setattr(layer, name, value)
        _settle_or_leave(layers)
        raise


def _settle_or_leave(layers: Sequence[AdaptedLayer]) -> None:
    """Settles the layers; if their adapters cannot be written again, leaves them with their base."""
    try:
        for layer in layers:
            layer.settle()
    except BaseException:
        for layer in layers:
            layer.merged_adapters, layer.switched_to = [], None
            layer.take_out()


def switch_layers(layers: Sequence[AdaptedLayer], adapter_name: str | None) -> None:
    """Switches all layers to an adapter, or (None) to their base. If anything is raised, they are as they were before."""
    with all_or_nothing(layers):
        for layer in layers:
            layer.is_switched, layer.switched_to = True, adapter_name
            layer.settle()


def end_switch(layers: Sequence[AdaptedLayer]) -> None:
    """Ends the switched state: base weights are restored, and the active adapters run again."""
    for layer in layers:
        if layer.is_switched:
            layer.is_switched, layer.switched_to = False, None
            layer.settle()


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Restores the base weights while adapters are added or deleted, or the base is read.

    Afterwards the layers are merged and switched as before, as far as the adapters still exist; rows of tokens, too.
    """
    layers = adapted_layers(model)
    switched = [layer for layer in layers if layer.is_switched]
    name = switched[0].switched_to if switched else None
    end_switch(switched)
    merged = [layer for layer in layers if layer.base_weight.adapters]
    for layer in merged:
        layer.take_out()
    try:
        with rows_aside(model):
            yield
    finally:
        if switched:
            layers = adapted_layers(model)
            switch_layers(layers, name if any(str(name) in layer.s2ft_block for layer in layers) else None)
        for layer in merged:
            layer.settle()


def require_own(model: nn.Module, what: str, allowed: Collection[str] = ()) -> None:
    """Raises `S2FTError` if `what` is not possible in a layer of the model; see `AdaptedLayer.why_not_own`."""
    raise_together(dict.fromkeys(filter(None, (layer.why_not_own(what, allowed) for layer in adapted_layers(model)))))


def refuse_inside(model: nn.Module, what: str) -> None:
    """Raises `S2FTError` if `model` is in the in-place layout."""
    require_own(model, what, allowed=["merged", "switched"])
