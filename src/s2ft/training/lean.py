"""Activations that save less for backward: what is cheap is computed again.

    gated activation   h = act(g) · u                  autograd saves g, act(g), u;     here g and u
    RMSNorm            y = w · x / sqrt(mean x² + ε)   autograd saves x in fp32;        here x as it came, and one number a row

    quantised y = x Wᵀ        libraries save x, or W dequantised;          here nothing (`layer/frozen.py`)

`lean(model)` gives these to every module that computes them, which it finds out on random input, not by the module's class.
On a GPU, Liger's kernels do the same where they are installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from s2ft.layer.dequantise import quantised_layers
from s2ft.layer.frozen import through_frozen, why_not_frozen
from s2ft.layer.linears import features, linear_layer, weight_of
from s2ft.selection.families import ACTIVATIONS, NORM_EPSILONS, RMS_NORM
from s2ft.selection.structure import read_structures
from s2ft.training.probe import unnoticed

Activation = str  # "silu" | "gelu_tanh" | "gelu"
NormKind = str
NORM_KINDS = ("llama", "olmo", "gemma")
Forward = Callable[..., Tensor]  # of a module, which it takes first
Recognise = Callable[[nn.Module], Forward | None]

_GATE = "_apply_gate"  # what transformers calls for the activation of stacked experts

_FORWARD: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}
_BACKWARD: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "gelu": torch.ops.aten.gelu_backward,
}


class GatedActivation(Function):
    """act(gate) · up; saves gate and up."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,  # [*, channels]
        up: Tensor,  # [*, channels]
        activation: Activation,
    ) -> Tensor:  # [*, channels]
        """Returns act(gate) · up."""
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _FORWARD[activation](gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # grad: [*, channels]
        """Returns act′(gate) · up · grad and act(gate) · grad, the activation computed again."""
        gate, up = ctx.saved_tensors
        grad_gate = _BACKWARD[ctx.activation](grad * up, gate) if ctx.needs_input_grad[0] else None
        grad_up = _FORWARD[ctx.activation](gate).mul_(grad) if ctx.needs_input_grad[1] else None
        return grad_gate, grad_up, None


class RMSNorm(Function):
    """x̂ = x / sqrt(mean x² + ε), times w, computed in fp32; saves x as it came. How it is rounded depends on the family.

    "llama"   w · round(x̂)        "olmo"   round(w · x̂)        "gemma"   round((1 + w) · x̂)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [*, channels]
        weight: Tensor,  # [channels]
        eps: float,
        kind: NormKind,
    ) -> Tensor:  # [*, channels]
        """Returns w · x̂, as the family `kind` rounds it."""
        exact = x.to(_wide(x))
        scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.kind = kind
        normed = exact * scale
        if kind == "llama":
            return weight * normed.to(x.dtype)
        return ((1.0 + weight.to(normed.dtype) if kind == "gemma" else weight) * normed).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # grad: [*, channels]
        """Returns (h - x̂ · mean(h x̂)) / sqrt(mean x² + ε), where h is grad · w, and the sum of grad · x̂ over the rows."""
        x, weight, scale = ctx.saved_tensors
        normed = x.to(_wide(x)) * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).reshape(-1, len(weight)).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None, None
        if ctx.kind == "llama":
            scaled = (grad * weight).to(normed.dtype)
        else:
            scaled = grad.to(normed.dtype) * (1.0 + weight.to(normed.dtype) if ctx.kind == "gemma" else weight)
        along = (scaled * normed).mean(-1, keepdim=True)
        return scaled.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), grad_weight, None, None


def _wide(x: Tensor) -> torch.dtype:
    """The dtype to compute in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(eq=False)
class Patches:
    """Modules whose `forward`, or experts whose gate, is replaced, on the instance."""

    methods: dict[tuple[nn.Module, str], Callable[..., Tensor]] = field(default_factory=dict)

    def add(self, module: nn.Module, name: str, method: Callable[..., Tensor]) -> None:
        """Replaces the module's method of this name."""
        setattr(module, name, method)
        self.methods[module, name] = method

    def undo(self) -> None:
        """Gives every module its own methods back, unless they were replaced again since."""
        for (module, name), method in self.methods.items():
            if vars(module).get(name) is method:
                delattr(module, name)
        self.methods.clear()


def lean(model: nn.Module) -> Patches:
    """Replaces the forward of modules that save too much; `undo()` of the result puts everything back.

    Modules that are patched already are left alone. Each module is tried by itself, in training mode: one that has dropout, or
    scales of its own, gives something else and is left alone too.
    """
    patches = Patches()
    for module, name, recognise in _candidates(model):
        method = _ask(module, recognise)
        if method is not None:
            patches.add(module, name, partial(method, module))
    return patches


def _ask(module: nn.Module, recognise: Recognise) -> Forward | None:
    """What `recognise` finds; None if the module cannot be run on random input."""
    try:
        with unnoticed(module, training=True):
            return recognise(module)
    except Exception:
        return None


def _candidates(model: nn.Module) -> Iterator[tuple[nn.Module, str, Recognise]]:
    """Methods that may compute a gated activation or an RMSNorm, and that nobody has patched."""
    mlps = {s.path: s for s in read_structures(model).structures if s.kind == "mlp"}
    for path, module in model.named_modules():
        if {"forward", _GATE} & vars(module).keys():
            continue
        if hasattr(module, _GATE):
            yield module, _GATE, _recognise_gate
        elif path in mlps:
            names = {p.name: p.module.removeprefix(f"{path}.") for p in mlps[path].projections}
            yield module, "forward", partial(_recognise_mlp, names=names)
        elif type(module).__name__.endswith(RMS_NORM):
            yield module, "forward", _recognise_norm
    for path, layer in quantised_layers(model).items():
        if "forward" not in vars(layer) and not path.endswith(".base_layer"):  # a tuner layer sees to its own
            yield layer, "forward", _recognise_quantised


def _recognise_quantised(linear: nn.Module) -> Forward | None:
    """The layer with nothing saved; None if it cannot be read, or is trained itself."""
    return None if why_not_frozen(linear) else _frozen_forward


def _frozen_forward(linear: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    product = type(linear).forward
    if len(args) != 1 or kwargs:
        y: Tensor = product(linear, *args, **kwargs)
        return y
    return through_frozen(linear, partial(product, linear), args[0])


def _recognise_norm(norm: nn.Module) -> Forward | None:
    """The lean forward that computes what `norm` does, for input in its own dtype and in others."""
    weight = getattr(norm, "weight", None)
    eps = next((getattr(norm, name) for name in NORM_EPSILONS if hasattr(norm, name)), None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or weight.is_meta or not isinstance(eps, float):
        return None  # a buffer may be there for show, as in Falcon-Mamba's norms, which take input of any width
    samples = [
        _sample(2, len(weight), like=weight).to(dtype) for dtype in (weight.dtype, torch.bfloat16, torch.float32)
    ]
    for kind in NORM_KINDS:
        if all(_same(norm(x), RMSNorm.apply(x, weight, eps, kind), exactly=True) for x in samples):
            return partial(_norm_forward, eps=eps, kind=kind)
    return None


def _norm_forward(norm: nn.Module, *args: Any, eps: float, kind: NormKind, **kwargs: Any) -> Tensor:
    y: Tensor
    if len(args) != 1 or kwargs:
        y = type(norm).forward(norm, *args, **kwargs)
    elif kind != "olmo" and _liger(args[0]):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        y = LigerRMSNormFunction.apply(args[0], norm.weight, eps, float(kind == "gemma"), kind, False)
    else:
        y = RMSNorm.apply(args[0], norm.weight, eps, kind)
    return y


def _recognise_mlp(mlp: nn.Module, names: dict[str, str]) -> Forward | None:
    """The lean forward that computes what a gated MLP does: down(act(gate(x)) · up(x))."""
    if "gate_proj" not in names:
        return None
    activations = (_name(getattr(mlp, child, None)) for child in ACTIVATIONS)
    activation = next(filter(None, activations), None)
    up = linear_layer(mlp.get_submodule(names["up_proj"]))
    if activation is None or up is None or weight_of(up).is_meta:
        return None
    forward = partial(_mlp_forward, names=names, activation=activation)
    small = _sample(2, features(up)[0], like=weight_of(up))
    return forward if all(_same(mlp(x), forward(mlp, x)) for x in (small, 8 * small)) else None


def _recognise_gate(experts: nn.Module) -> Forward | None:
    """The lean gate of stacked experts that computes what theirs does: act(gate) · up."""
    activation = _name(getattr(experts, "act_fn", None))
    rows = _sample(4, 2 * 8, like=next(experts.parameters()))
    if activation is None or rows.is_meta:
        return None
    gate = partial(_gate, activation=activation)
    return gate if all(_same(getattr(experts, _GATE)(x), gate(experts, x)) for x in (rows, 8 * rows)) else None


def _gate(experts: nn.Module, rows: Tensor, activation: Activation) -> Tensor:  # [pairs, 2 n] → [pairs, n]
    gated: Tensor = GatedActivation.apply(*rows.chunk(2, dim=-1), activation)
    return gated


def _mlp_forward(mlp: nn.Module, *args: Any, names: dict[str, str], activation: Activation, **kwargs: Any) -> Tensor:
    if len(args) != 1 or kwargs:
        y: Tensor = type(mlp).forward(mlp, *args, **kwargs)
        return y
    (x,) = args
    down, up = mlp.get_submodule(names["down_proj"]), mlp.get_submodule(names["up_proj"])
    if names["gate_proj"] == names["up_proj"]:
        gates, ups = up(x).chunk(2, dim=-1)
    else:
        gates, ups = mlp.get_submodule(names["gate_proj"])(x), up(x)
    if activation == "silu" and _liger(x):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        y = down(LigerSiLUMulFunction.apply(gates, ups))
    else:
        y = down(GatedActivation.apply(gates, ups, activation))
    return y


def _name(act: Any) -> Activation | None:
    """Which of the known activations `act` computes."""
    if not callable(act):
        return None
    x = torch.linspace(-4, 4, 65, device="cpu")
    return next((name for name, known in _FORWARD.items() if torch.equal(act(x), known(x))), None)


def _sample(*shape: int, like: Tensor) -> Tensor:
    """Random input from a generator of its own."""
    dtype = like.dtype if like.is_floating_point() else torch.float32
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(like.device, dtype)


def _same(theirs: Any, ours: Tensor, exactly: bool = False) -> bool:
    """Equal but for rounding, and not by being zero.

    Args:
        exactly: In rounding too, which tells families of norms apart; but for float64, where theirs go through float32.
    """
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    if exactly and ours.dtype != torch.float64:
        return torch.equal(theirs, ours) and bool(ours.any())
    error, size = (theirs.double() - ours.double()).abs().max(), theirs.double().abs().max()
    return bool(0 < size < torch.inf and error <= (4e-3 if ours.dtype.itemsize == 2 else 1e-5) * size)


@cache
def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _liger(x: Tensor) -> bool:
    return x.is_cuda and _has_liger()
