"""Training in place: the trained slice is written into the base weight, at its slot.

    forward    W[slot] ← own values + V, rounded to W's dtype;   y = base(x): one dense product and nothing else
    backward   the base layer's own input gradient, and the slice's gradient
               input side   dL/dV = gᵀ x[..., slot]     saves a copy of the selected activations
               output side  dL/dV = g[..., slot]ᵀ x     saves the layer's input, as its neighbours do

What is trained is still the delta V, in fp32 and with the checkpoint's channels; the slot is written again whenever V may have
changed (S²FT paper, §3.3: update in place). `layer/base_weight.py` stashes the weight's own values, and restores them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # the public name imports torch's compiler at once

from s2ft.common.errors import S2FTError
from s2ft.layer.backprop import BeforeBackward, SliceGradient, may_change, stamp
from s2ft.layer.base_weight import Stash
from s2ft.layer.linears import weight_matrix, weight_of

_UNKNOWN = (0, -1)  # the stamp of a delta that must be written again


class Slot:
    """The part of a base weight that holds one adapter's slice, while a model is in the in-place layout.

    Args:
        linear: The base layer; its channels are in the layout's order.
        stash: The slot's channels, in the order of the delta's, and the weight's own values there.
    """

    def __init__(self, linear: nn.Module, stash: Stash) -> None:
        self.stash = stash
        if weight_matrix(linear).ndim == 2:  # the channels of stacked experts lie apart
            stash.find_start()
        self._written: tuple[int, int] | None = None  # the stamp of the delta that was written; None: the own values
        self._is_open, self._is_compiled = True, False
        self._parameter = weight_of(linear)
        stash.write(weight_matrix(linear))  # to the parameter: autograd refuses graphs that were made before

    def close(self, linear: nn.Module) -> None:
        """Ends the use of the slot: graphs that were made with it are refused from here on."""
        self._is_open = False
        self._check_parameter(linear)
        self.stash.write(weight_matrix(linear))  # to the parameter, as above

    def expire(self) -> None:
        """Lets the next forward pass write the slot again, even if the delta's version is the same."""
        if self._written is not None:
            self._written = _UNKNOWN

    def hold(self, linear: nn.Module, delta: Tensor | None, anew: bool = False) -> None:
        """Makes the slot hold the own values + delta, or (None) the own values.

        Args:
            linear: The base layer.
            delta: [out_features, s] on the input side, [s, in_features] on the output side.
            anew: Write even if the delta's version is the same: writes to its `data`, as by some optimizers, do not count.
        """
        if not self._is_open:
            raise S2FTError(
                "this graph was made inside `s2ft.in_place(model)`, which has been left: run backward inside"
            )
        self._check_parameter(linear)
        wanted = None if delta is None else stamp(delta)
        if wanted != self._written or (anew and delta is not None):
            self._write(linear, delta)
            self._written = wanted

    def forward(
        self,
        base: Callable[[Tensor], Tensor],
        linear: nn.Module,
        x: Tensor,  # [*, in_features]
        delta: Tensor | None,  # [out_features, s] or [s, in_features]; None: without the adapter
    ) -> Tensor:  # [*, out_features]
        """base(x) with the delta in the weight, or without it."""
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or (delta is not None and delta.requires_grad))
        if delta is None and not needs_grad and (self._is_compiled or torch.compiler.is_compiling()):
            return self._without(base, linear, x)
        if torch.compiler.is_compiling():
            return self._compiled(base, linear, x, delta)
        self.hold(linear, delta, anew=True)
        y = base(x)
        if needs_grad:
            before = partial(self.before_backward, linear, delta)
            if delta is not None and delta.requires_grad:
                return self._with_gradient(x, y, delta, before)
            y = BeforeBackward.apply(y, before)
        return y

    def _compiled(
        self,
        base: Callable[[Tensor], Tensor],
        linear: nn.Module,
        x: Tensor,  # [*, in_features]
        delta: Tensor | None,
    ) -> Tensor:  # [*, out_features]
        """For compiled code, which cannot look at addresses and versions: writes the slot in every pass."""
        if weight_of(linear) is not self._parameter:
            raise _replaced(weight_of(linear))
        self._write(linear, delta)
        self._written, self._is_compiled = None if delta is None else _UNKNOWN, True
        y = base(x)
        if delta is None or not (torch.is_grad_enabled() and delta.requires_grad):
            return y
        return self._with_gradient(x, y, delta, None)

    @_disable_dynamo  # a compiled write would raise the parameter's version, by which autograd refuses the other graph
    def _without(
        self,
        base: Callable[[Tensor], Tensor],
        linear: nn.Module,
        x: Tensor,  # [*, in_features]
    ) -> Tensor:  # [*, out_features]
        """base(x) with the own values; the slot then holds again what it held.

        A compiled graph that is still to go backward has the weight itself, not a copy: nothing may have changed there.
        """
        weight = self._whole_weight(linear)
        held = self.stash.read(weight)
        self.expire()  # in case the base layer raises
        self.stash.write(weight)
        y = base(x)
        self.stash.put_back(weight, held)
        return y

    def _with_gradient(
        self,
        x: Tensor,  # [*, in_features]
        y: Tensor,  # [*, out_features]
        delta: Tensor,
        before: Callable[[], None] | None,  # called ahead of backward
    ) -> Tensor:  # [*, out_features]
        if self.stash.dim == 1:
            kept, picks = self.stash.pick(x.detach(), copy=True), None
        else:
            kept, picks = x.detach(), self.stash.pick
        traced: Tensor = SliceGradient.apply(y, kept.to(y.dtype), delta, picks, before, may_change(y))
        return traced

    def before_backward(self, linear: nn.Module, delta: Tensor | None) -> None:
        """Makes the slot hold what it held in the forward pass."""
        self.hold(linear, delta)
        self.expire()  # an optimizer that writes to `data` may follow

    def _write(self, linear: nn.Module, delta: Tensor | None) -> None:
        self.stash.write(self._whole_weight(linear), delta)

    def _check_parameter(self, linear: nn.Module) -> None:
        """FSDP2 puts other parameters in: whole ones for a pass, its shards afterwards. Another view of the values will do."""
        now = weight_of(linear)
        is_view = type(now.data) is Tensor and now.data_ptr() == self._parameter.data_ptr()
        if now is not self._parameter and not is_view:
            raise _replaced(now)

    def _whole_weight(self, linear: nn.Module) -> Tensor:
        weight = weight_matrix(linear).data
        if type(weight) is not Tensor:
            raise _replaced(weight)
        return weight


def _replaced(weight: Tensor) -> S2FTError:
    return S2FTError(
        f"a base weight has become another {type(weight).__name__} inside `s2ft.in_place(model)`, which holds on to whole "
        "weights; shard or quantise the model first, and enter after it"
    )
