"""What an adapted layer runs, and what stands in its base weight for it.

    ordinary    y = base(x) + the active adapters' slices                  PEFT's way
    merged      y = base(x)                                                base holds W + ΔW of every merged adapter
    switched    y = base(x)                                                base holds W + ΔW of one adapter, or W of none
    disabled    y = base(x)                                                base holds W, for as long as that lasts
    in place    y = base(x)                                                base holds W + ΔW of the adapter that trains

What should stand in the weight follows from the layer's state. After every change of it, `settle` makes the weight hold that
(`layer/base_weight.py`); in place, the forward pass does (`layer/slot.py`). What needs the weight's own values asks
`require_own`. A layer without a slice of an adapter takes part all the same: it runs its base. All layers of a model share
`Shared`, so that they agree where PEFT asks them one by one.

The forward pass of a switched model reads one flag, the same for every adapter and for none: a compiled model is compiled once.
`switch` in `tuner/switching.py` is what people call.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import Tensor, nn

from s2ft.common.errors import S2FTError, raise_together
from s2ft.layer.base_weight import BaseWeight, add_delta, plain_matrix, shared_weights, take_slice
from s2ft.layer.linears import why_not_plain
from s2ft.layer.turns import Turns

_STATE = ("merged_adapters", "_disable_adapters", "is_switched", "switched_to")  # decides what stands in the weight


class Shared:
    """What the layers of one model have in common."""

    def __init__(self) -> None:
        self.layers: WeakSet[AdaptedLayer] = WeakSet()
        self.turns = Turns()

    def __reduce__(self) -> tuple[type[Shared], tuple[()]]:
        """For copies and pickles: layers that are copied join anew."""
        return Shared, ()

    @property
    def adapters(self) -> list[str]:
        """The names of the model's adapters, sorted."""
        return sorted({name for layer in self.layers for name in layer.s2ft_block})


class AdaptedLayer(BaseTunerLayer):
    """What `S2FTLinear` is besides: a layer whose base weight can take adapters in, and give them back."""

    is_switched = False
    switched_to: str | None = None
    layout: Any = None  # the model's Layout, inside `in_place`

    base_layer: nn.Module
    s2ft_block: nn.ModuleDict
    training: bool
    merged_adapters: list[str]  # in their order; also those without a slice here
    shared: Shared
    base_weight: BaseWeight

    def join(self, shared: Shared) -> None:
        """Becomes one of a model's layers: active, merged and disabled is what is so in the others."""
        peer = next(iter(shared.layers), None)
        if peer is not None:
            self._active_adapter, self._disable_adapters = peer.active_adapter, peer.disable_adapters
            self.merged_adapters = list(peer.merged_adapters)
            self.is_switched, self.switched_to = peer.is_switched, peer.switched_to
        self.shared = shared
        shared.layers.add(self)

    @property
    def standing(self) -> tuple[str, ...]:
        """The adapters that should stand in the base weight."""
        if self.disable_adapters:
            return ()
        return tuple(self.merged_adapters) or (() if self.switched_to is None else (self.switched_to,))

    def settle(self) -> None:
        """Makes the base weight hold what should stand in it; if anything is raised, it holds its own values."""
        if self.standing != self.base_weight.adapters:
            slices = {name: self.block(name) if name in self.s2ft_block else None for name in self.standing}
            with self._onloaded():
                self.base_weight.hold(self.get_base_layer(), slices)

    def take_out(self) -> None:
        """The base weight's own values again, until the layer settles anew."""
        if self.base_weight.adapters or not self.base_weight.is_own:
            with self._onloaded():
                self.base_weight.restore(self.get_base_layer())

    def _onloaded(self) -> AbstractContextManager[Any]:
        """With the base weight's values here, where accelerate has offloaded them."""
        return onload_layer(self) if hasattr(self.get_base_layer(), "_hf_hook") else nullcontext()

    # ---- merging -----------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the active (or named) adapters' slices into the base weight; while adapters are disabled, from then on.

        Args:
            safe_merge: Check that the new values are finite.

        Raises:
            S2FTError: and the weight is what it was.
        """
        names = list(dict.fromkeys(check_adapters_to_merge(self, adapter_names)))
        self.refuse_merging(names)
        with all_or_nothing([self]):
            self.merged_adapters = [*self.merged_adapters, *names]
            self.settle()
            for name in names if safe_merge else ():
                if name in self.s2ft_block and not self._merged_values(name).isfinite().all():
                    raise S2FTError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

    def refuse_merging(self, names: Sequence[str]) -> None:
        """Raises `S2FTError` where these adapters cannot be merged."""
        self.require_own("merging", allowed=["merged"])
        elsewhere = [name for name in names if name not in self.s2ft_block]
        if elsewhere:  # to ask all layers takes its time
            raise_together(not_loaded(elsewhere, self.shared.adapters))
        if problem := self.why_unwritable(names):
            raise S2FTError(f"the layer cannot be merged into: {problem}")

    def why_unwritable(self, names: Sequence[str]) -> str | None:
        """Why the base weight cannot take these adapters' slices."""
        reason = why_not_plain(self.get_base_layer()) if any(name in self.s2ft_block for name in names) else None
        return f"its weight {reason}; s2ft trains on it, but writes into plain weights only" if reason else None

    def _merged_values(self, name: str) -> Tensor:  # [out_features, s] or [s, in_features]
        block = self.block(name)
        weight = plain_matrix(self.get_base_layer(), "merging")
        values = take_slice(weight, block.dim, block.indices.to(weight.device))
        return values if name in self.base_weight.adapters else add_delta(values, block.weight.data.to(weight.device))

    def unmerge(self) -> None:
        """The base weight's own values again: bit for bit what they were."""
        self.merged_adapters = []
        self.settle()

    # ---- PEFT's own calls --------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT; it ends the switched state."""
        names = list(dict.fromkeys([adapter_names] if isinstance(adapter_names, str) else adapter_names))
        self.refuse_beside_layout(names)
        end_switch([self])
        self._activate(names, inference_mode)

    def refuse_beside_layout(self, names: Sequence[str]) -> None:
        """Raises `S2FTError` inside `in_place`, where other adapters than its own would be active."""
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
        """As in PEFT; what stands in the base weight goes out of it while adapters are disabled, and comes back after."""
        with all_or_nothing([self]):
            if not self.is_switched:
                super().enable_adapters(enabled)
            self._disable_adapters = not enabled
            self.settle()

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; a layer that is switched to the adapter gets its base weight back first.

        Where it was the only active one, the next is chosen among the model's adapters, not among this layer's.
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
        """Who is active after the adapter is gone; PEFT's rule, for the model as a whole."""
        others = [name for name in self.active_adapters if name != adapter_name]
        if not others:
            others = [name for name in self.shared.adapters if name != adapter_name][:1]
            if others:
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {others[0]}.",
                    stacklevel=3,
                )
        return others

    # ---- refusing ----------------------------------------------------------------------------------------------------

    def why_not_own(self, what: str, allowed: Collection[str] = ()) -> str | None:
        """Why `what` is not possible: the base weight does not hold its own values.

        Args:
            what: How the reason begins, such as "merging".
            allowed: States that are no reason: "merged", "switched".
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
        """Raises `S2FTError` with that reason."""
        raise_together(filter(None, [self.why_not_own(what, allowed)]))

    def check_switched_forward(self, adapter_names: list[str] | None) -> None:
        """Raises `S2FTError` for a mixed batch while an adapter stands in the base weight, and for training."""
        if adapter_names is not None:
            self.require_own("`adapter_names`", allowed=["merged"])
        if self.training and torch.is_grad_enabled():
            raise S2FTError(
                f"the model is switched to {self.switched_to!r}, and its adapters do not train: call "
                "`model.set_adapter(name)` to train, or `model.eval()` to run it"
            )

    def block(self, adapter_name: str) -> Any:  # S2FTBlock
        """The adapter's slice of this layer."""
        return self.s2ft_block[adapter_name]


def not_loaded(names: Iterable[str], loaded: Collection[str]) -> Iterator[str]:
    """A problem for each name that is no loaded adapter's."""
    for name in names:
        if name not in loaded:
            yield f"adapter {name!r} is not loaded; loaded are {', '.join(map(repr, loaded)) or 'none'}"


def adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """The model's S²FT layers, in its own order."""
    return [module for module in model.modules() if isinstance(module, AdaptedLayer)]


def turns_of(model: nn.Module) -> Turns:
    """The lock of a model with S²FT layers; one without gets one of its own."""
    return next((layer.shared.turns for layer in adapted_layers(model)), Turns())


def mark_shared(model: nn.Module) -> None:
    """Tells each layer whether its weight is read by another module too; before slices are put into it."""
    shared = shared_weights(model)
    for layer in adapted_layers(model):
        if layer.base_weight.is_own:
            linear = layer.get_base_layer()
            layer.base_weight.is_shared = why_not_plain(linear) is None and layer.weight.data_ptr() in shared


@contextmanager
def all_or_nothing(layers: Sequence[AdaptedLayer]) -> Iterator[None]:
    """What is merged, disabled and switched; if anything is raised, all layers are as they were before."""
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
    """Where what stood in the weights cannot be written either, the base by itself is always possible."""
    try:
        for layer in layers:
            layer.settle()
    except BaseException:
        for layer in layers:
            layer.merged_adapters, layer.switched_to = [], None
            layer.take_out()


def switch_layers(layers: Sequence[AdaptedLayer], adapter_name: str | None) -> None:
    """Switches all layers to an adapter, or to none. If anything is raised, they are as they were before."""
    with all_or_nothing(layers):
        for layer in layers:
            layer.is_switched, layer.switched_to = True, adapter_name
            layer.settle()


def end_switch(layers: Sequence[AdaptedLayer]) -> None:
    """Back to the ordinary state: the base weights are their own again."""
    for layer in layers:
        if layer.is_switched:
            layer.is_switched, layer.switched_to = False, None
            layer.settle()


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Base weights of their own while adapters are added or deleted, or the base is read; afterwards what was there before,
    as far as it still exists.
    """
    layers = adapted_layers(model)
    switched = [layer for layer in layers if layer.is_switched]
    name = switched[0].switched_to if switched else None
    end_switch(switched)
    merged = [layer for layer in layers if layer.base_weight.adapters]
    for layer in merged:
        layer.take_out()
    try:
        yield
    finally:
        if switched:
            layers = adapted_layers(model)
            switch_layers(layers, name if any(str(name) in layer.s2ft_block for layer in layers) else None)
        for layer in merged:
            layer.settle()


def require_own(model: nn.Module, what: str, allowed: Collection[str] = ()) -> None:
    """Raises `S2FTError` where a base weight of the model does not hold its own values; see `AdaptedLayer.why_not_own`."""
    raise_together(dict.fromkeys(filter(None, (layer.why_not_own(what, allowed) for layer in adapted_layers(model)))))


def refuse_inside(model: nn.Module, what: str) -> None:
    """Raises `S2FTError` if `model` is in the in-place layout."""
    require_own(model, what, allowed=["merged", "switched"])
