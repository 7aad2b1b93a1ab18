"""One adapter's slice of one linear layer: the delta V of its s channels, and what it adds to the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from s2ft.common.errors import S2FTError
from s2ft.format.slices import Slice
from s2ft.layer.backprop import AddAt, AddProduct, ProjectTap, SelectTap, eager_grad, may_change, times
from s2ft.layer.sharding import like, local
from s2ft.layer.split import Share

T = TypeVar("T")


class S2FTBlock(nn.Module):
    """One adapter's slice of one layer: `weight`, the delta V, and `indices`, its channels.

    A module rather than a parameter: then names end in `.weight` below the adapter's name, by which TRL copies a reference
    adapter.

    Args:
        trained: The side of the layer, and the channels.
        across: How many features the other side has.
        dtype: Of the delta.
        zero: Start from zeros; else from random values.
    """

    weight: nn.Parameter
    indices: Tensor  # [s], int64
    is_parked = False  # kept in the host's memory by `tuner/switching.py`
    finite_at: tuple[int, int] | None = None  # address and version of the delta that was last found finite

    def __init__(
        self,
        trained: Slice,
        across: int,
        dtype: torch.dtype = torch.float32,
        zero: bool = True,
    ) -> None:
        super().__init__()
        self.trained, self.side = trained, trained.side
        count = len(trained.indices)
        shape = (across, count) if trained.side == "in" else (count, across)
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype) if zero else 0.02 * torch.randn(shape, dtype=dtype))
        self.register_buffer("indices", torch.from_numpy(trained.indices.copy()))

    @property
    def dim(self) -> int:
        """The dimension of the weight matrix [out_features, in_features] that `indices` select along."""
        return 1 if self.side == "in" else 0

    def tap(
        self,
        x: Tensor,  # [*, in_features], or this process's share of them
        dtype: torch.dtype,
        share: Share | None = None,  # of the input
    ) -> tuple[Tensor, Tensor]:  # [*, in_features], [*, s]
        """The input of the base layer, and what goes around that layer: x[..., idx] or x Vᵀ, in `dtype`."""
        if self.side == "in":
            x, selected = _select(x, self._own(share))
            selected = selected.to(dtype)
            return x, selected if share is None else share.gather(selected, self.trained.indices)
        source = x.to(dtype)
        if source is x and eager_grad(x):
            taped: tuple[Tensor, Tensor] = self(_project_tap, x)
            return taped
        product: Tensor = self(times, source)
        return x, product

    def add_to(
        self,
        y: Tensor,  # [*, out_features], or this process's share of them
        around: Tensor,  # [*, s], from `tap`
        in_place: bool,
        share: Share | None = None,  # of the output
    ) -> Tensor:  # [*, out_features]
        """Adds the slice's contribution to the base layer's output."""
        added: Tensor
        if self.side == "in":
            added = self(_add_product if in_place else _plus_product, y, around)
            return added
        if share is not None:
            around = share.take(around, self.trained.indices)
        indices = self._own(share)
        added = AddAt.apply(y, around, indices) if in_place else y.index_add(-1, indices, around)
        return added

    def _own(self, share: Share | None) -> Tensor:  # [own channels], int64
        """The channels of this process, counted from the first that it has."""
        return self.indices if share is None else self.indices[share.within(self.trained.indices)] - share.start

    def forward(self, product: Callable[..., T], *operands: Tensor) -> T:
        """`product(*operands, V)`, with V in the operands' dtype.

        A pass through the layer reads V here alone, once, in a call of this module: engines that shard parameters gather
        a module's when it is called.
        """
        return product(*operands, self.weight.to(operands[0].dtype))

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """As in every module, but for indices on device meta, which have no values: accelerate would look for their mesh."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.indices.is_meta:
            destination.pop(prefix + "indices")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As in every module; indices that differ from the config's are refused, and values that are not finite."""
        state_dict = self._completed(state_dict, prefix)
        found = state_dict.get(prefix + "indices")
        if found is not None and not found.is_meta:
            expected = self.trained.indices
            if found.numel() != len(expected) or not bool((found.cpu() == torch.from_numpy(expected)).all()):
                raise S2FTError(f"{prefix}indices differ from the slice {str(self.trained)!r} in the adapter's config")
            delta = state_dict.get(prefix + "weight")
            if delta is None or (not delta.is_meta and not local(delta).isfinite().all()):
                raise S2FTError(
                    f"{prefix}weight {'is missing' if delta is None else 'holds values that are not finite'}"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _completed(self, state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """The module's own part of a state, with the indices that device meta lost, and sharded as the delta is."""
        own = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        if self.indices.is_meta and prefix + "weight" in own:
            device = own[prefix + "weight"].device
            own.setdefault(prefix + "indices", torch.from_numpy(self.trained.indices.copy()).to(device))
        if prefix + "weight" in own:
            own[prefix + "weight"] = like(self.weight.data, own[prefix + "weight"])
        return own

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"side={self.side}, channels={self.indices.numel()}"


def _select(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:  # [*, in_features], [*, s]
    """The input and the selected activations."""
    if not eager_grad(x):
        return x, x.index_select(-1, indices)
    taped: tuple[Tensor, Tensor] = SelectTap.apply(x, indices)
    return taped


def _project_tap(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:  # [*, in_features], [s, in_features]
    taped: tuple[Tensor, Tensor] = ProjectTap.apply(x, delta)
    return taped


def _add_product(y: Tensor, around: Tensor, delta: Tensor) -> Tensor:  # [*, out_features], [*, s], [out_features, s]
    """Adds in place, unless an engine's hook has wrapped y on its way here, and autograd would refuse."""
    if not may_change(y):
        return _plus_product(y, around, delta)
    added: Tensor = AddProduct.apply(y, around, delta)
    return added


def _plus_product(y: Tensor, around: Tensor, delta: Tensor) -> Tensor:
    return y + times(around, delta)
