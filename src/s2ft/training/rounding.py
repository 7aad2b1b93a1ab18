"""Training in bfloat16 alone, by stochastic rounding: a step in float32 is rounded to one of its two neighbours at random.

    p(round up) = distance to the lower neighbour / distance between the two        E[rounded] = exact

Rounding to the nearest loses every step under half the distance between neighbours: of weights with σ = 0.02, 12% ignore a step
of 1e-4 and 69% one of 2e-5. With stochastic rounding, steps are kept on average, and parameters, gradients and optimizer states
take two bytes each between steps.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from s2ft.common.errors import S2FTError

_LOW_BITS = 1 << 16  # the values of the 16 bits that float32 has and bfloat16 lacks


def round_stochastically(values: Tensor) -> Tensor:  # float32 → bfloat16, same shape
    """Rounds each value to one of its neighbours in bfloat16, the nearer the likelier; those that bfloat16 has stay.

    Example:
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator ...>
        >>> rounded = round_stochastically(torch.full((10000,), 1 + 2**-9))  # a quarter of the way from 1 to 1 + 2**-7
        >>> sorted(set(rounded.tolist())), round(rounded.float().mean().item(), 3)
        ([1.0, 1.0078125], 1.002)
    """
    if values.dtype != torch.float32:
        raise S2FTError(f"round_stochastically takes float32, not {values.dtype}")
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(_LOW_BITS, bits.shape, dtype=torch.int32, device=bits.device)
    rounded = (bits + noise).bitwise_and_(-_LOW_BITS).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def round_steps(optimizer: Optimizer) -> None:
    """From here on, `optimizer` steps its bfloat16 parameters in float32, and rounds them and its states stochastically.

    Works with every optimizer that has torch's interface and is given no closure; other parameters step as before. Between
    steps, parameters, gradients and states are bfloat16; float32 copies exist within a step only.

    Raises:
        S2FTError: in a step that is given a closure.
    """
    original: dict[Tensor, tuple[Tensor, Tensor]] = {}  # parameter → its own storage and gradient, during a step

    def widen(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise S2FTError("an optimizer whose steps are rounded takes no closure; call backward() before step()")
        restore(stepped=False)  # in case the last step raised; gradients that were computed since are kept
        for parameter in _rounded(optimizer):
            gradient = cast(Tensor, parameter.grad)
            original[parameter] = (parameter.data, gradient)
            parameter.data = parameter.data.float()
            parameter.grad = gradient.float()
            _cast_states(optimizer, parameter, Tensor.float)

    def narrow(*_: Any) -> None:
        restore(stepped=True)

    @torch.no_grad()
    def restore(stepped: bool) -> None:
        for parameter, (data, gradient) in original.items():
            wide, now = parameter.data, parameter.grad
            parameter.data = data
            parameter.copy_(round_stochastically(wide))  # through the parameter, so that its version counts on
            parameter.grad = gradient if stepped else None if now is None else now.to(torch.bfloat16)
            _cast_states(optimizer, parameter, round_stochastically)
        original.clear()

    optimizer.register_step_pre_hook(widen)
    optimizer.register_step_post_hook(narrow)


def _rounded(optimizer: Optimizer) -> list[Tensor]:
    """The bfloat16 parameters that have a gradient to step by."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [p for p in parameters if p.dtype == torch.bfloat16 and p.grad is not None]


def _cast_states(optimizer: Optimizer, parameter: Tensor, cast: Any) -> None:
    """Casts the parameter's states, whole or factored by rows and columns; not the step count."""
    states = optimizer.state.get(parameter, {})
    for name, value in states.items():
        if isinstance(value, Tensor) and value.ndim > 0 and value.dtype in (torch.float32, torch.bfloat16):
            states[name] = cast(value)
