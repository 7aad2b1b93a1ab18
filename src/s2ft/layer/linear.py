"""A linear layer with trained slices: the forward pass, and what PEFT asks of a tuner layer.

The base layer stays as it is; an adapter adds to its output what the delta V of its s channels contributes.

    input side (o, down)     y = base(x);  y += x[..., idx] Vᵀ       V: [out_features, s]    ΔW[:, idx] = V
    output side (q, ..., up) y = base(x);  y[..., idx] += x Vᵀ       V: [s, in_features]     ΔW[idx, :] = V

Backward (S²FT paper, §3.3) computes the slice's gradient alone. The input side keeps a copy of the s selected
activations and nothing else; the output side needs the layer's input, which its neighbours share. The slice's share of
the input gradient is added onto the base layer's own, in place: hence `x` passes through a *tap* on its way into the base
layer, whose backward receives the base layer's gradient as a fresh tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from s2ft.common.errors import S2FTError
from s2ft.format.slices import Indices, Slice, put
from s2ft.layer.adapted import AdaptedLayer, Shared
from s2ft.layer.backprop import may_change
from s2ft.layer.base_weight import BaseWeight
from s2ft.layer.block import S2FTBlock
from s2ft.layer.frozen import through_frozen
from s2ft.layer.linears import as_matrix, features, is_plain, linear_layer, weight_matrix, weight_of
from s2ft.layer.mixed import add_mixed
from s2ft.layer.pack import LooseSlice, MixedBatch, find_slice, forget, wrong_count
from s2ft.layer.sharding import is_sharded
from s2ft.layer.slot import Slot
from s2ft.layer.split import agree, share_of

MARK = "taken_in_place"  # a key that a state has for each slice that stood in its base weight
NO_DATA_PARALLEL = (
    "nn.DataParallel copies the model to each GPU in every pass, which {} does not go with; give each GPU a process of its own "
    "(`accelerate launch`), or show the program one GPU (CUDA_VISIBLE_DEVICES=0)"
)
Base = Callable[[Tensor], Tensor]  # the base layer: [*, in_features] → [*, out_features]


class S2FTLinear(nn.Module, AdaptedLayer):
    """A linear layer with a trained slice for each adapter (PEFT's tuner layer)."""

    adapter_layer_names = ("s2ft_block",)
    other_param_names = ()
    taken_in_place = True  # `torch.distributed.checkpoint` looks for each key of a state as an attribute
    experts = 1  # whose channels lie side by side in the layer (`layer/experts.py`)

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
        self.base_weight = BaseWeight()
        self.slot: Slot | None = None  # inside `in_place`, where its adapter's slice stands in the base weight
        self.register_load_state_dict_post_hook(_write_anew)
        self.join(shared or Shared())
        if trained is not None:
            self.update_layer(adapter_name, trained, **options)

    def update_layer(
        self, adapter_name: str, trained: Slice, init_weights: bool = True, inference_mode: bool = False, **_: Any
    ) -> None:
        """Adds an adapter.

        Args:
            adapter_name: Its name.
            trained: Its slice of this layer.
            init_weights: Start from a delta of zeros, so that nothing changes; else from random values, for tests.
            inference_mode: The adapter is not to be trained.

        Raises:
            S2FTError: inside `in_place`, or if the layer has fewer channels.
        """
        self.require_own(f"adding the adapter {adapter_name!r}", allowed=["merged", "switched"])
        inputs, outputs = self.in_features, self.out_features
        size, across = (inputs, outputs) if trained.side == "in" else (outputs, inputs)
        if trained.indices[-1] >= size:
            raise S2FTError(
                f"the slice {str(trained)!r} reaches past the {size} channels of the layer's {trained.side}put side"
            )
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        self.s2ft_block[adapter_name] = S2FTBlock(trained, across, dtype, zero=init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if not init_weights:
            agree(self.get_base_layer(), self.block(adapter_name).weight.data)
        self._activate(self.active_adapters, inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the base layer's device, but not, as PEFT would have it, to its dtype: deltas stay fp32."""
        if adapter_name in self.s2ft_block and not self.block(adapter_name).weight.is_meta:
            self.block(adapter_name).to(device or self.weight.device)

    def forward(
        self,
        x: Tensor,  # [*, in_features]
        *args: Any,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> Tensor:  # [*, out_features]
        """The base layer's output plus what the active adapters add, or what stands for that in the layer's state.

        Args:
            x: The layer's input.
            args: Passed on to the base layer.
            adapter_names: The adapter of each row of the batch, or `__base__`.
            kwargs: Passed on to the base layer.

        Raises:
            S2FTError: if the layer's state does not allow it, such as training while it is switched.
        """

        def run(x: Tensor) -> Tensor:
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y

        def base(x: Tensor) -> Tensor:
            linear = self.get_base_layer()  # another method's adapter may lie between
            return through_frozen(linear, run, x) if linear is self.base_layer else run(x)

        if self.layout is not None:
            return self._forward_in_place(base, x, adapter_names)
        running = self.active_adapters
        if self.runs_base_alone(adapter_names):
            running = self.standing_beside()
            if not running:
                return base(x)
        elif adapter_names is not None:
            return self._mixed_batch_forward(base, x, adapter_names)
        return self._with_slices(base, x, [self.block(name) for name in running if name in self.s2ft_block])

    def runs_base_alone(self, adapter_names: Sequence[str] | None) -> bool:
        """Whether a pass outside `in_place` adds nothing to what the base layer holds; raises `S2FTError` if it cannot run."""
        if self.is_switched and (adapter_names is not None or self.training):
            self.check_switched_forward(adapter_names)
        return bool((adapter_names is None and (self.is_switched or self.merged)) or self.disable_adapters)

    def standing_beside(self) -> list[str]:
        """The adapters that the base weight would hold, if it could be written to."""
        return list(self.base_weight.adapters) if self.base_weight.is_beside and not self.disable_adapters else []

    def _with_slices(
        self,
        base: Base,
        x: Tensor,  # [*, in_features]
        blocks: list[S2FTBlock],
    ) -> Tensor:  # [*, out_features]
        """base(x) plus what each slice adds."""
        dtype = self.compute_dtype(x)
        around = []
        share = share_of(self.get_base_layer(), 1, x)
        for block in blocks:
            x, part = block.tap(x, dtype, share)
            around.append(part)
        y = base(x)
        in_place, share = may_change(y), share_of(self.get_base_layer(), 0, y)
        for block, part in zip(blocks, around, strict=True):
            y = block.add_to(y, part.to(y.dtype), in_place, share)
        return y

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the base layer's output: autocast's, else the input's."""
        kind = x.device.type
        is_cast = kind != "meta" and torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if is_cast else x.dtype

    def _mixed_batch_forward(
        self,
        base: Base,
        x: Tensor,  # [rows, *, in_features], or flattened as the batch says
        adapter_names: list[str],
    ) -> Tensor:  # [rows, *, out_features], or flattened
        """base(x) plus what each row's own adapter adds to it."""
        batch = adapter_names if isinstance(adapter_names, MixedBatch) else MixedBatch(adapter_names)
        rows = batch.unflatten(x)
        if len(rows) != len(batch):
            if not self.holds_any(batch.distinct):
                return base(x)
            raise S2FTError(wrong_count(len(batch), len(rows)))
        self.refuse_mixed_on_merged()
        y, linear = base(x), self.get_base_layer()
        if share_of(linear, 1, x) or share_of(linear, 0, y):
            raise S2FTError(
                "a mixed batch is not computed where tensor parallelism splits a layer; run one adapter at a time"
            )
        return add_mixed(self, batch.unflatten(y), rows, batch).reshape(y.shape)

    def holds_any(self, names: Iterable[str]) -> bool:
        """Whether any of these adapters has a slice here, its own or from a pool."""
        return any(find_slice(self, name) is not None for name in names)

    def refuse_mixed_on_merged(self) -> None:
        """Raises `S2FTError` while adapters are merged, which all rows of a mixed batch would get."""
        if self.merged:
            raise S2FTError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. "
                f"Merged: {', '.join(self.merged_adapters)}"
            )

    # ---- in place ----------------------------------------------------------------------------------------------------

    def enter_layout(self, layout: Any, channels: Tensor | None) -> None:
        """From here on the base weight holds the slice of the layout's adapter.

        Args:
            layout: The model's `Layout`.
            channels: [s], where the slice's channels are in the layout's order; None: the slice is added around the layer.
        """
        self.layout = layout
        if channels is not None:
            linear = self.get_base_layer()
            weight = weight_matrix(linear).data
            dim = self.block(layout.adapter).dim
            self.slot = Slot(linear, self.base_weight.set_aside(weight, dim, channels.to(weight.device)))

    def leave_layout(self) -> None:
        """Restores the base weight."""
        slot, self.slot, self.layout = self.slot, None, None
        if slot is not None:
            slot.close(self.get_base_layer())
        self.base_weight.restore(self.get_base_layer())

    def _forward_in_place(self, base: Base, x: Tensor, adapter_names: list[str] | None) -> Tensor:  # as `forward`
        running = [name for name in self.running_in_place(adapter_names) if name in self.s2ft_block]
        block = self.block(running[0]) if running else None
        if self.slot is None:
            return self._with_slices(base, x, [] if block is None else [block])
        delta = None if block is None else block.weight
        return self.slot.forward(base, self.get_base_layer(), x, delta)

    def running_in_place(self, adapter_names: Sequence[str] | None) -> list[str]:
        """The layout's adapter, unless adapters are disabled; raises `S2FTError` for others beside it."""
        if adapter_names is not None:
            self.require_own("`adapter_names`", allowed=["merged", "switched"])
        if self.disable_adapters:
            return []
        self.refuse_beside_layout(self.active_adapters)
        return [self.layout.adapter]

    # ---- what torch calls --------------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> S2FTLinear:
        """As in every module; the kept values of the base weight are moved and cast with it."""
        super()._apply(fn, recurse)
        self.base_weight.apply(fn)
        if self.slot is not None:
            self.slot.expire()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy joins the other layers of the copied model."""
        super().__setstate__(state)
        self.shared.layers.add(self)

    def _replicate_for_data_parallel(self) -> S2FTLinear:
        """As in every module; not inside `in_place`, where copies on several devices would share one slot."""
        if self.layout is not None:
            raise S2FTError(NO_DATA_PARALLEL.format("`s2ft.in_place`"))
        replica: S2FTLinear = super()._replicate_for_data_parallel()
        return replica

    def train(self, mode: bool = True) -> S2FTLinear:
        """As in every module; the slot and the table of a mixed batch are written anew, since deltas may have changed."""
        if self.slot is not None:
            self.slot.expire()
        forget(self)
        super().train(mode)
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; with the table of a mixed batch, which holds its slice once more."""
        super().delete_adapter(adapter_name)
        forget(self)

    def choose(self, adapter_name: str, indices: Indices) -> None:
        """Replaces the channels of an adapter that is about to be loaded.

        Args:
            adapter_name: Its name.
            indices: [s], as many as before.
        """
        self.require_own("loading other channels")
        block = self.block(adapter_name)
        block.trained = Slice(block.side, indices)
        block.indices.data.copy_(torch.from_numpy(indices))
        forget(self)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """As in every module; inside `in_place` with a mark, since base weights are not as outside."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.slot is None:
            return
        weight = weight_of(self.get_base_layer())
        if not (weight.is_meta or is_sharded(weight)):  # there, accelerate asks every tensor of the state for its mesh
            destination[f"{prefix}{MARK}"] = torch.tensor(True)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        refuse_marked(state_dict, prefix)
        if any(key.startswith(f"{prefix}base_layer.") for key in state_dict):
            self.require_own("loading base weights")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's ΔW as a dense tensor, shaped like the base weight; for conversions only."""
        if adapter not in self.s2ft_block:
            raise S2FTError(f"adapter {adapter!r} has no slice of this layer; it has {', '.join(self.s2ft_block)}")
        block, base = self.block(adapter), self.get_base_layer()
        values = block.weight.detach()
        if hasattr(values, "full_tensor"):  # a DTensor
            values = values.full_tensor()
        shape = (self.out_features, self.in_features)  # not that of the weight, which may be packed
        if isinstance(base, Conv1D):
            shape = shape[::-1]
        delta = values.new_zeros(weight_of(base).shape if weight_of(base).ndim == 3 else shape)
        put(as_matrix(base, delta), block.dim, block.indices, values)
        return delta

    def take_base_dtype(self, adapter_name: str) -> None:
        """Casts the adapter's delta to the dtype of the base weight, unless that is quantised."""
        if adapter_name in self.s2ft_block and is_plain(self.get_base_layer()):
            self.block(adapter_name).to(self.weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """ΔW has rank s at most, so PEFT's `convert_to_lora` is exact from rank s on."""
        return True

    def __repr__(self) -> str:
        return "s2ft." + super().__repr__()


def _write_anew(layer: nn.Module, _: Any) -> None:
    """After loading: adapters in the base weight take the values that were loaded."""
    assert isinstance(layer, S2FTLinear)
    if layer.base_weight.adapters:
        layer.take_out()
        layer.settle()


def sliced_layers(model: nn.Module, adapter_name: str) -> dict[str, S2FTLinear]:
    """Path in `model` → layer, of the layers that have a slice of the adapter."""
    layers = ((path, module) for path, module in model.named_modules() if isinstance(module, S2FTLinear))
    return {path: layer for path, layer in layers if adapter_name in layer.s2ft_block}


def refuse_marked(state_dict: Mapping[str, Any], prefix: str = "") -> None:
    """Raises `S2FTError` for base weights that were taken inside `in_place`, here or in a module below."""
    keys = [key for key in state_dict if key.startswith(prefix)]
    if any(key.endswith(MARK) for key in keys) and any("base_layer." in key for key in keys):
        raise S2FTError(
            "this state was taken inside `s2ft.in_place(model)`, where base weights are permuted and hold the slices; take it "
            "outside, or save the adapter alone"
        )
