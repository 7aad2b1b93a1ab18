"""Whether gradients pass through a quantised model: one layer of each class against its dequantised weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from s2ft.common.errors import S2FTError, first_line, raise_together
from s2ft.layer.dequantise import keep_trainable, quantised_layers, values_of
from s2ft.layer.linears import features

PASSES = 0.05  # the largest relative error of an input gradient: kernels for half precision stay far below


def check_trainable(model: nn.Module) -> None:
    """Raises `S2FTError` for each class of quantised layers that gives no gradient, or another than its dequantised weight's.

    The model is in training mode afterwards.
    """
    keep_trainable(model)
    model.train()
    first: dict[str, tuple[str, nn.Module]] = {}
    for path, layer in quantised_layers(model).items():
        first.setdefault(type(layer).__name__, (path, layer))
    raise_together(
        f"{path} ({name}) cannot be trained through: {problem}"
        for name, (path, layer) in first.items()
        if (problem := _problem(layer))
    )


def _problem(layer: nn.Module) -> str | None:
    try:
        error = gradient_error(layer)
    except (S2FTError, RuntimeError, NotImplementedError, TypeError) as reason:  # as kernels without a backward raise
        return first_line(reason)
    if error is None:
        return "it gives its input no gradient"
    return None if error <= PASSES else f"its gradient differs from that of its dequantised weight by {error:.0%}"


def gradient_error(layer: nn.Module) -> float | None:
    """The relative error of the layer's own input gradient, against its dequantised weight; None where it gives none.

    Raises:
        S2FTError: if its weight cannot be read.
    """
    values = values_of(layer)
    generator = torch.Generator().manual_seed(0)
    x = _draw(3, features(layer)[0], values, generator).requires_grad_()
    with torch.enable_grad():
        y = layer(x)
    cotangent = _draw(3, features(layer)[1], values, generator).to(y.dtype)
    if not y.requires_grad:
        return None
    (found,) = torch.autograd.grad(y, x, cotangent, allow_unused=True)
    if found is None:
        return None
    expected = cotangent.double() @ values.double()
    return float((found.double() - expected).norm() / expected.norm())


def _draw(rows: int, columns: int, like: Tensor, generator: torch.Generator) -> Tensor:  # [rows, columns]
    return torch.randn(rows, columns, generator=generator).to(like.device, like.dtype)
