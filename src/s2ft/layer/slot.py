"""A trained slice that lives in the base weight: its slot.

    forward    W[slot] ← base slice + V, rounded to W's dtype;   y = base(x): one dense product, and nothing around it
    backward   the base layer's own input gradient, and the slice's
               input side   dL/dV = gᵀ x[..., slot]     keeps a copy of the selected activations
               output side  dL/dV = g[..., slot]ᵀ x     keeps the layer's input, which its neighbours share

The delta V stays what is trained, in fp32 and in the checkpoint's coordinates; the slot is written anew whenever V may have
changed. The base slice is kept aside, so that the base can be had back by copy (S²FT paper, §3.3: update in place).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from s2ft.common.errors import S2FTError
from s2ft.layer.backprop import BeforeBackward, SliceGradient, may_change
from s2ft.layer.base_weight import add_delta
from s2ft.layer.linears import weight_matrix

_UNKNOWN = (0, -1)  # the slot holds some delta


class Slot:
    """Where one adapter's slice lies in a base weight while a model is in the in-place layout.

    Args:
        linear: The base layer, its channels in the layout's order, with its own values.
        dim: Of the weight matrix [out_features, in_features] that channels lie along.
        positions: [s], where the slice's channels are, in the order of the delta's.
    """

    def __init__(self, linear: nn.Module, dim: int, positions: Tensor) -> None:
        self.dim, self.positions = dim, positions
        self.order: Tensor | None = None  # slot position → the delta's channel; None: the same order
        self.back: Tensor | None = None  # and back
        first, last = int(positions.min()), int(positions.max())
        self.start = first if last - first + 1 == len(positions) else None  # None: gathered, not side by side
        if self.start is not None and not bool((positions.diff() > 0).all()):
            self.order, self.back = positions.argsort(), positions - first
        self.stash = weight_matrix(linear).data.index_select(dim, positions)  # in the delta's order
        self._held: tuple[int, int] | None = None  # delta and version in the slot; None: the base's own values
        self._is_open = True
        self._write(weight_matrix(linear), None)  # through the parameter: graphs that were made before are refused

    def close(self, linear: nn.Module) -> None:
        """Puts the base's own values back for good."""
        self.hold(linear, None)
        self._write(weight_matrix(linear), None)  # through the parameter: graphs that still need the slot are refused
        self._is_open = False

    def expire(self) -> None:
        """The slot is written anew at the next forward pass, whatever the delta's version says."""
        if self._held is not None:
            self._held = _UNKNOWN

    def hold(self, linear: nn.Module, delta: Tensor | None, anew: bool = False) -> None:
        """Makes the slot hold base + delta, or (None) the base's own values.

        Args:
            anew: Even if neither delta nor version has changed: writes to `.data`, as some optimizers make, are not counted.
        """
        if not self._is_open:
            raise S2FTError(
                "this graph was made inside `s2ft.in_place(model)`, which has been left: run backward inside"
            )
        wanted = None if delta is None else (delta.data_ptr(), delta._version)
        if wanted != self._held or (anew and delta is not None):
            self._write(weight_matrix(linear).data, delta)
            self._held = wanted

    def forward(
        self,
        base: Callable[[Tensor], Tensor],
        linear: nn.Module,
        x: Tensor,  # [*, in_features]
        delta: Tensor | None,  # None: without the adapter
        training: bool,
    ) -> Tensor:  # [*, out_features]
        """base(x) with the delta in the weight, or without it."""
        if torch.compiler.is_compiling():
            return self._compiled(base, linear, x, delta)
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or (delta is not None and delta.requires_grad))
        self.hold(linear, delta, anew=training or needs_grad)
        y = base(x)
        if not needs_grad:
            return y
        before = partial(self._before_backward, linear, delta)
        if delta is None or not delta.requires_grad:
            return BeforeBackward.apply(y, before)
        return SliceGradient.apply(y, self._kept(x).to(y.dtype), delta, self._picks(), before, may_change(y))

    def _before_backward(self, linear: nn.Module, delta: Tensor | None) -> None:
        self.hold(linear, delta)
        self.expire()  # an optimizer may follow that changes the delta unseen

    def _compiled(self, base: Callable[[Tensor], Tensor], linear: nn.Module, x: Tensor, delta: Tensor | None) -> Tensor:
        self._write(weight_matrix(linear).data, delta)
        self._held = None if delta is None else _UNKNOWN
        y = base(x)
        if delta is None or not (torch.is_grad_enabled() and delta.requires_grad):
            return y
        return SliceGradient.apply(y, self._kept(x).to(y.dtype), delta, self._picks(), None, False)

    def _kept(self, x: Tensor) -> Tensor:
        """What backward needs of x; a copy where it is a part, so that the whole is not kept alive."""
        if self.dim == 0:
            return x.detach()
        part = self._pick(x.detach())
        is_view = self.start is not None and self.back is None
        return part.clone(memory_format=torch.contiguous_format) if is_view else part

    def _picks(self) -> Callable[[Tensor], Tensor] | None:
        return None if self.dim == 1 else self._pick

    def _pick(self, channels: Tensor) -> Tensor:  # [*, channels] → [*, s], in the delta's order
        if self.start is None:
            return channels.index_select(-1, self.positions)
        part = channels.narrow(-1, self.start, len(self.positions))
        return part if self.back is None else part.index_select(-1, self.back)

    @torch.no_grad()
    def _write(self, weight: Tensor, delta: Tensor | None) -> None:
        if self.stash.device != weight.device:
            self.apply(lambda kept: kept.to(weight.device))
        if type(weight.data) is not Tensor:
            raise S2FTError(
                f"a base weight has become a {type(weight.data).__name__} inside `s2ft.in_place(model)`, which holds on to "
                "whole weights; shard or quantise the model first, and enter after it"
            )
        values = self.stash if delta is None else add_delta(self.stash, delta.detach().to(weight.device))
        values = values.to(weight.dtype)
        if self.start is None:
            weight.index_copy_(self.dim, self.positions, values)
            return
        part = weight.narrow(self.dim, self.start, len(self.positions))
        part.copy_(values if self.order is None else values.index_select(self.dim, self.order))

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """What `nn.Module.to` and its like do to the layer's tensors is done to the kept ones too."""
        for name in ("positions", "order", "back", "stash"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else change(value))
        self.expire()
