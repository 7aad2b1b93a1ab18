"""The switched state of a layer: one adapter's slice stands in the base weight, what it replaced is kept.

    ordinary    y = base(x) + the active adapters' slices                  PEFT's way
    switched    y = base(x)                                                base holds W + ΔW of one adapter, or W of none

    W[:, idx] ──take──▶ kept          restore: kept ──copy──▶ W[:, idx], bit for bit
         └──── + V ──copy──▶ W[:, idx]

The forward pass reads one flag, the same for every adapter and for none: a compiled model is compiled once. `switch` in
`adapter/switching.py` is what people call; here is what a layer does, and what PEFT's own calls mean to a switched one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from s2ft.errors import S2FTError

if TYPE_CHECKING:
    from s2ft.method.linear import S2FTBlock

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Switchable(BaseTunerLayer):
    """What `S2FTLinear` is besides: a layer whose base weight can take an adapter in, and give it back."""

    is_switched = False
    switched_to: str | None = None
    _kept: tuple[int, Tensor, Tensor] | None = None  # dimension, channels, and the base weight's own values there

    base_layer: nn.Module
    s2ft_block: nn.ModuleDict
    training: bool

    def write(self, adapter_name: str | None) -> None:
        """Adds the adapter's delta to the base weight; for None, an adapter without a slice here, and while adapters
        are disabled, the weight stays as it is.
        """
        if adapter_name is None or adapter_name not in self.s2ft_block or self.disable_adapters:
            return
        block = cast("S2FTBlock", self.s2ft_block[adapter_name])
        weight = self._plain_weight()
        delta = block.weight.data.to(weight.device, non_blocking=weight.is_cuda)  # from a GPU, waiting is a must
        indices = block.indices.to(weight.device, non_blocking=weight.is_cuda)
        base = take_slice(weight, block.dim, indices)
        values = (base.to(delta.dtype) + delta).to(base.dtype)
        self._kept = (block.dim, indices, base)  # before the weight changes: from here on `restore` can undo it
        put_slice(weight, block.dim, indices, values)

    def restore(self) -> None:
        """Puts the base weight's own values back."""
        if self._kept is not None:
            weight = self._plain_weight()
            dim, indices, base = self._kept
            put_slice(weight, dim, indices.to(weight.device), base.to(weight.device, weight.dtype))
            self._kept = None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT; it ends the switched state."""
        leave([self])
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.s2ft_block and (block := cast("S2FTBlock", self.s2ft_block[name])).is_parked:
                self._move_adapter_to_device_of_base_layer(name)
                block.is_parked = False

    def enable_adapters(self, enabled: bool) -> None:
        """As in PEFT; in a switched layer, what stands in the base weight goes out of it, and a switched adapter comes back."""
        if not self.is_switched:
            super().enable_adapters(enabled)
            return
        if not enabled and self.merged:
            self.unmerge()  # as a forward pass without adapters does
        self.restore()
        self._disable_adapters = not enabled
        self.write(self.switched_to)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; a layer that is switched to the adapter gets its base weight back first."""
        if self.switched_to == adapter_name:
            self.restore()
            self.switched_to = None
        super().delete_adapter(adapter_name)

    def refuse_switched(self, what: str) -> None:
        """Raises `S2FTError` while an adapter stands in the base weight."""
        if self.is_switched and self.switched_to is not None:
            raise S2FTError(
                f"{what} is not possible while the model is switched to {self.switched_to!r}; call "
                "`s2ft.switch(model, None)` or `model.set_adapter(name)` first"
            )

    def check_switched_forward(self, adapter_names: list[str] | None) -> None:
        """Raises `S2FTError` for a mixed batch while an adapter stands in the base weight, and for training."""
        if adapter_names is not None:
            self.refuse_switched("`adapter_names`")
        if self.training and torch.is_grad_enabled():
            raise S2FTError(
                f"the model is switched to {self.switched_to!r}, and its adapters do not train: call "
                "`model.set_adapter(name)` to train, or `model.eval()` to run it"
            )

    def _plain_weight(self) -> Tensor:
        raise NotImplementedError


def take_slice(weight: Tensor, dim: int, indices: Tensor) -> Tensor:  # weight: [out_features, in_features]
    """A copy of the weight's channels `indices`. Columns on a CPU go by `gather` of integers: up to twice as fast."""
    if not _lies_in_columns(weight, dim):
        return weight.index_select(dim, indices)
    bits = _INTEGERS[weight.itemsize]
    return weight.view(bits).gather(dim, _every_entry(weight, dim, indices)).view(weight.dtype)


def put_slice(weight: Tensor, dim: int, indices: Tensor, values: Tensor) -> None:
    """`weight.index_copy_(dim, indices, values)`; columns on a CPU go by `scatter_` of integers, up to twice as fast."""
    if _lies_in_columns(weight, dim):
        bits = _INTEGERS[weight.itemsize]
        weight.view(bits).scatter_(dim, _every_entry(weight, dim, indices), values.view(bits))
    else:
        weight.index_copy_(dim, indices, values)


def _lies_in_columns(weight: Tensor, dim: int) -> bool:
    return weight.device.type == "cpu" and weight.stride(dim) == 1


def _every_entry(weight: Tensor, dim: int, indices: Tensor) -> Tensor:
    """The index of each entry of the slice, as `gather` and `scatter_` want it; no memory is taken."""
    if dim == 1:
        return indices.expand(weight.shape[0], -1)
    return indices[:, None].expand(-1, weight.shape[1])


def switchable_layers(model: nn.Module) -> list[Switchable]:
    """The model's S²FT layers, in its own order."""
    return [module for module in model.modules() if isinstance(module, Switchable)]


def enter(layers: Sequence[Switchable], adapter_name: str | None) -> None:
    """Switches all layers to an adapter, or to none. If anything is raised, they are as they were before."""
    before = [(layer.is_switched, layer.switched_to) for layer in layers]
    try:
        _restore(layers)
        for layer in layers:
            layer.is_switched, layer.switched_to = True, adapter_name
            layer.write(adapter_name)
    except BaseException:
        _go_back(layers, before)
        raise


def leave(layers: Sequence[Switchable]) -> None:
    """Back to the ordinary state: the base weights are their own again."""
    _restore(layers)
    for layer in layers:
        if layer.is_switched:
            layer.is_switched, layer.switched_to = False, None


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """The ordinary state while adapters are added or deleted; afterwards the same adapter as before, if it still exists."""
    layers = switchable_layers(model)
    switched = [layer for layer in layers if layer.is_switched]
    name = switched[0].switched_to if switched else None
    leave(switched)
    try:
        yield
    finally:
        if switched:
            layers = switchable_layers(model)
            enter(layers, name if any(str(name) in layer.s2ft_block for layer in layers) else None)


def _restore(layers: Sequence[Switchable]) -> None:
    for layer in reversed(layers):  # the last written first: layers may share a weight
        layer.restore()


def _go_back(layers: Sequence[Switchable], before: Sequence[tuple[bool, Any]]) -> None:
    _restore(layers)
    for layer, (was_switched, name) in zip(layers, before, strict=True):
        layer.is_switched, layer.switched_to = was_switched, name
    try:
        for layer in layers:
            layer.write(layer.switched_to)
    except BaseException:  # not even the earlier adapter can be written: the base by itself is always possible
        _restore(layers)
        for layer in layers:
            layer.switched_to = None
