"""Stacked experts, read as linear layers: transformers keeps the weights of all experts of a block in one parameter.

    down_proj      [experts, hidden, channels]         y = Σₑ Dₑ hₑ       one layer, which reads the channels of all experts
    gate_up_proj   [experts, 2 · channels, hidden]     hₑ = act(Gₑ x) · Uₑ x    one layer, which computes them

Side by side, expert after expert, the channels of all experts are those of one linear layer: [hidden, experts · channels], of
which a token uses those of its experts. So a slice of experts is a slice like any other: sides, indices, deltas, files,
digests and fusion are the same. Its weight is kept as a stack [experts, out, in]; expert e's channel c is e · size + c.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from s2ft.common.errors import S2FTError
from s2ft.layer.linears import linear_layer

DOWN = "down_proj"
UPS = ("gate_up_proj", "up_proj")


@dataclass(frozen=True, eq=False)
class Experts:
    """A module that stacks its experts, by the conventions of transformers' `use_experts_implementation`."""

    module: nn.Module
    up: str  # the parameter before the activation: one of `UPS`
    count: int
    channels: int  # FFN channels of an expert
    hidden: int
    is_gated: bool
    is_transposed: bool  # parameters are [experts, in, out]
    is_interleaved: bool  # gate 0, up 0, gate 1, up 1, ...; else gates first
    is_sorted: bool  # the module is called with every token of each expert, one expert after the other (Llama 4)

    @property
    def rows(self) -> int:
        """Rows of an expert in `up`."""
        return 2 * self.channels if self.is_gated else self.channels

    def matrix(self, name: str) -> Tensor:  # [experts, out, in], a view
        """One of the parameters, frozen."""
        weight = self.module.get_parameter(name).detach()
        return weight.mT if self.is_transposed else weight

    @property
    def up_bias(self) -> Tensor | None:  # [experts, rows]
        """What is added before the activation."""
        bias: Tensor | None = getattr(self.module, f"{self.up}_bias", None)
        return None if bias is None else bias.detach()

    def activation(self, rows: Tensor) -> Tensor:  # [pairs, n rows of each of gate and up] → [pairs, n]
        """What the module computes of the rows of its `up`, as they lie there."""
        module: Any = self.module
        if not self.is_gated:
            channels: Tensor = module.act_fn(rows)
        elif hasattr(module, "_apply_gate"):
            channels = module._apply_gate(rows)  # noqa: SLF001 - transformers' hook for experts; there is no public one
        else:
            gate, up = rows.chunk(2, dim=-1)
            channels = module.act_fn(gate) * up
        return channels


def find_experts(module: nn.Module) -> Experts | None:
    """How `module` stacks its experts; None if it does not.

    Raises:
        S2FTError: if it does, but not in a way that s2ft can read.
    """
    module = below_adapters(module)
    up = next((name for name in UPS if _is_stack(module, name)), None)
    if up is None or not _is_stack(module, DOWN):
        return None
    if problem := _why_unreadable(module):
        raise S2FTError(problem)
    gated, transposed = up == UPS[0], bool(getattr(module, "is_transposed", _is_sorted(module)))
    ups, downs = (_shape(module, name, transposed) for name in (up, DOWN))
    experts = Experts(
        module,
        up=up,
        count=downs[0],
        channels=downs[2],
        hidden=downs[1],
        is_gated=gated,
        is_transposed=transposed,
        is_interleaved=not getattr(module, "is_concatenated", True),
        is_sorted=_is_sorted(module),
    )
    if ups != (experts.count, experts.rows, experts.hidden):
        raise S2FTError(
            f"{up} and {DOWN} of {type(module).__name__} are of shapes {ups} and {downs}, which do not match"
        )
    return experts


def below_adapters(module: nn.Module) -> nn.Module:
    """The module itself, without what PEFT has put around it."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


class StackedLinear(nn.Module):
    """One of the parameters of stacked experts as a linear layer; it owns nothing, and is never run.

    Args:
        experts: The module that holds the parameter.
        name: The parameter's.
    """

    def __init__(self, experts: Experts, name: str) -> None:
        super().__init__()
        self.experts, self.name, self.is_transposed = experts, name, experts.is_transposed
        is_down = name == DOWN
        self.in_features = experts.count * experts.channels if is_down else experts.hidden
        self.out_features = experts.hidden if is_down else experts.count * experts.rows

    @property
    def weight(self) -> Tensor:  # [experts, out, in], or [experts, in, out] where it is transposed
        """The parameter itself."""
        weight: Tensor = getattr(self.experts.module, self.name)
        return weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            setattr(self.experts.module, self.name, value)
        else:
            super().__setattr__(name, value)


def stacked_linear(module: nn.Module, name: str) -> StackedLinear | None:
    """The parameter `name` of `module` as a linear layer; None unless it is one of stacked experts."""
    owner = below_adapters(module)
    if name not in (*UPS, DOWN) or not _is_stack(owner, name) or (experts := find_experts(owner)) is None:
        return None
    return StackedLinear(experts, name)


def linear_at(model: nn.Module, path: str) -> nn.Module | None:
    """The linear layer at `path`, a module or a parameter of stacked experts, below any adapter; None if there is none."""
    parent, _, name = path.rpartition(".")
    try:
        holder = model.get_submodule(parent)
    except AttributeError:
        return None
    child = getattr(holder, name, None)
    return linear_layer(child) if isinstance(child, nn.Module) else stacked_linear(holder, name)


def _is_stack(module: nn.Module, name: str) -> bool:
    parameter = dict(module.named_parameters(recurse=False)).get(name)
    return parameter is not None and len(getattr(parameter, "ds_shape", parameter.shape)) == 3


def _shape(module: nn.Module, name: str, transposed: bool) -> tuple[int, int, int]:  # experts, out, in
    parameter = module.get_parameter(name)
    count, first, second = getattr(parameter, "ds_shape", parameter.shape)
    return (count, second, first) if transposed else (count, first, second)


def _is_sorted(module: nn.Module) -> bool:
    return not hasattr(module, "has_gate") and len(inspect.signature(module.forward).parameters) == 1


def _why_unreadable(module: nn.Module) -> str | None:
    kind = type(module).__name__
    if any(not p.is_floating_point() or p.itemsize == 1 for p in module.parameters(recurse=False)):
        return f"{kind} holds quantised experts, and s2ft reads the values of linear layers only"
    if not hasattr(module, "has_gate") and not _is_sorted(module):
        return f"{kind} runs its experts by code of its own, not by transformers' experts interface"
    if getattr(module, "has_post_expert_norm", False):
        return f"{kind} has a norm behind each expert, which what a slice adds would have to go through"
    if getattr(module, "_is_expert_parallel", False):  # transformers' own mark; there is no public one
        return f"{kind} is split over processes (expert parallel)"
    return None
