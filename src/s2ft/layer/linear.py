"""The trained slice of one linear layer: forward, partial back-propagation, merge.

The base layer stays a plain layer; the adapter adds what the delta V of its s chosen channels adds to the output.

    input side (o, down)     y = base(x);  y += x[..., idx] Vᵀ       V: [out_features, s]    ΔW[:, idx] = V
    output side (q, ..., up) y = base(x);  y[..., idx] += x Vᵀ       V: [s, in_features]     ΔW[idx, :] = V

Backward (S²FT paper, §3.3) computes the slice's gradient alone. The input side keeps a copy of the s selected
activations and nothing else; the output side needs the layer's input, which its neighbours share. The slice's share of
the input gradient is added onto the base layer's own, in place: hence `x` passes through a *tap* on its way into the base
layer, whose backward receives the base layer's gradient as a fresh tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from s2ft.common.errors import S2FTError
from s2ft.format.slices import Indices, Slice
from s2ft.layer.adapted import AdaptedLayer, Shared
from s2ft.layer.backprop import may_change
from s2ft.layer.base_weight import BaseWeight
from s2ft.layer.block import S2FTBlock
from s2ft.layer.linears import as_matrix, features, is_plain, linear_layer
from s2ft.layer.mixed import add_mixed
from s2ft.layer.pack import LooseSlice, forget
from s2ft.layer.slot import Slot


class S2FTLinear(nn.Module, AdaptedLayer):
    """A linear layer with a trained slice for each adapter (PEFT's tuner layer)."""

    adapter_layer_names = ("s2ft_block",)
    other_param_names = ()

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        trained: Slice | None = None,  # None: no adapter yet
        shared: Shared | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        linear = linear_layer(base_layer)
        if linear is None:
            raise S2FTError(f"{type(base_layer).__name__} is no linear layer; s2ft slices linear layers")
        self.in_features, self.out_features = features(linear)
        self.s2ft_block = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.pooled: dict[str, LooseSlice] = {}  # adapters that an `AdapterPool` holds beside the model's own
        self.base_weight, self.held = BaseWeight(), ()
        self._slot: Slot | None = None  # inside `in_place`: where the slice of its adapter lies in the base weight
        self.register_load_state_dict_post_hook(_write_anew)
        self.join(shared or Shared())
        if trained is not None:
            self.update_layer(adapter_name, trained, **options)

    def update_layer(
        self, adapter_name: str, trained: Slice, init_weights: bool = True, inference_mode: bool = False, **_: Any
    ) -> None:
        """Adds an adapter with the slice `trained`."""
        if self.layout is not None:
            raise S2FTError("adding an adapter is not possible inside `s2ft.in_place(model)`; leave it first")
        size, across = (
            (self.in_features, self.out_features) if trained.side == "in" else (self.out_features, self.in_features)
        )
        if trained.indices[-1] >= size:
            raise S2FTError(
                f"the slice {str(trained)!r} reaches past the {size} channels of the layer's {trained.side}put side"
            )
        dtype = torch.float64 if self.get_base_layer().weight.dtype == torch.float64 else torch.float32
        self.s2ft_block[adapter_name] = S2FTBlock(trained, across, dtype, zero=init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self._activate(self.active_adapters, inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the base layer's device, but not, as PEFT would have it, to its dtype: deltas stay fp32."""
        if adapter_name in self.s2ft_block and not self.block(adapter_name).weight.is_meta:
            self.block(adapter_name).to(device or self.weight.device)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """[*, in_features] → [*, out_features]. `adapter_names` gives each row of the batch its adapter or `__base__`."""
        if self.layout is not None:
            return self._forward_in_place(x, *args, adapter_names=adapter_names, **kwargs)
        if self.is_switched:
            return self._forward_switched(x, *args, adapter_names=adapter_names, **kwargs)
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        blocks = [self.block(name) for name in self.active_adapters if name in self.s2ft_block]
        return self._with_slices(x, blocks, *args, **kwargs)

    def _forward_in_place(self, x: Tensor, *args: Any, adapter_names: list[str] | None, **kwargs: Any) -> Tensor:
        held = self.layout.adapter
        if adapter_names is not None or not (self.disable_adapters or self.active_adapters == [held]):
            raise S2FTError(
                f"inside `s2ft.in_place(model)` the model runs the adapter {held!r} or none (disable_adapter); "
                f"asked for: {', '.join(map(str, adapter_names or self.active_adapters)) or 'none'}. Leave it first"
            )
        block = None if self.disable_adapters or held not in self.s2ft_block else self.block(held)
        if self._slot is None:
            return self._with_slices(x, [] if block is None else [block], *args, **kwargs)

        def base(x: Tensor) -> Tensor:
            return self.base_layer(x, *args, **kwargs)

        delta = None if block is None else block.weight
        return self._slot.forward(base, self.get_base_layer(), x, delta, self.training)

    def enter_layout(self, layout: Any, slot: Slot | None) -> None:
        """From here on the slice of the layout's adapter is held in the base weight, or (without a slot) around it."""
        self._slot, self.layout = slot, layout

    def leave_layout(self) -> None:
        """The base weight holds its own values again."""
        if self._slot is not None:
            self._slot.close(self.get_base_layer())
        self._slot = self.layout = None

    def _apply(self, fn: Any, recurse: bool = True) -> S2FTLinear:
        """As in every module; what the base weight gets back later is moved and cast with it."""
        super()._apply(fn, recurse)
        self.base_weight.apply(fn)
        if self._slot is not None:
            self._slot.apply(fn)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy joins the other layers of the copied model."""
        super().__setstate__(state)
        self.shared.layers.add(self)

    def train(self, mode: bool = True) -> S2FTLinear:
        """As in every module; the slot is written anew after each change of mode, and so is the table of a mixed batch."""
        if self._slot is not None:
            self._slot.expire()
        forget(self)
        super().train(mode)
        return self

    def slice_text(self, adapter_name: str) -> str:
        """The adapter's slice of this layer, such as "in 3,17,40-41"."""
        return self.block(adapter_name).slice_text

    def choose(self, adapter_name: str, indices: Indices) -> None:
        """Gives an adapter that is about to be loaded as many other channels."""
        self.require_own("loading other channels")
        block = self.block(adapter_name)
        block.slice_text = str(Slice(block.side, indices))
        block.indices.data.copy_(torch.from_numpy(indices))
        forget(self)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        if any(key.startswith(f"{prefix}base_layer.") for key in state_dict):
            self.require_own("loading base weights")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _forward_switched(self, x: Tensor, *args: Any, adapter_names: list[str] | None, **kwargs: Any) -> Tensor:
        """Straight through the base layer; rows can be mixed while no adapter stands in its weight."""
        if adapter_names is not None or self.training:
            self.check_switched_forward(adapter_names)
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        return self.base_layer(x, *args, **kwargs)

    def _with_slices(self, x: Tensor, blocks: list[S2FTBlock], *args: Any, **kwargs: Any) -> Tensor:
        dtype = self._compute_dtype(x)
        around = []
        for block in blocks:
            x, part = block.tap(x, dtype)
            around.append(part)
        y = self.base_layer(x, *args, **kwargs)
        in_place = may_change(y)
        for block, part in zip(blocks, around, strict=True):
            y = block.add_to(y, part.to(y.dtype), in_place)
        return y

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the base layer's output: autocast's, else the input's."""
        return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise S2FTError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively"
            )
        if self.merged:
            raise S2FTError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. "
                f"Merged: {', '.join(self.merged_adapters)}"
            )
        y = self.base_layer(x, *args, **kwargs)
        return add_mixed(self, y, x, adapter_names)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's ΔW as a dense tensor, shaped like the base weight: for conversion, never on a hot path."""
        if adapter not in self.s2ft_block:
            raise S2FTError(f"adapter {adapter!r} has no slice of this layer; it has {', '.join(self.s2ft_block)}")
        block, base = self.block(adapter), self.get_base_layer()
        values = block.weight.detach()
        if hasattr(values, "full_tensor"):  # a DTensor
            values = values.full_tensor()
        shape = (self.out_features, self.in_features)  # not that of the weight, which may be packed
        delta = values.new_zeros(shape[::-1] if isinstance(base, Conv1D) else shape)
        as_matrix(base, delta).index_copy_(block.dim, block.indices, values)
        return delta

    def take_base_dtype(self, adapter_name: str) -> None:
        """Casts the adapter's delta to the dtype of the base layer, where that is a floating-point one."""
        if adapter_name in self.s2ft_block and is_plain(self.get_base_layer()):
            self.block(adapter_name).to(self.weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """ΔW has rank s at most, so PEFT's `convert_to_lora` is exact from rank s on."""
        return True

    def block(self, adapter_name: str) -> S2FTBlock:
        """The adapter's slice of this layer."""
        block = self.s2ft_block[adapter_name]
        assert isinstance(block, S2FTBlock)
        return block

    def __repr__(self) -> str:
        return "s2ft." + super().__repr__()


def _write_anew(layer: nn.Module, _: Any) -> None:
    """After loading: what stands in the base weight has the values that were loaded."""
    assert isinstance(layer, S2FTLinear)
    if layer.held:
        layer.take_out()
        layer.settle()
