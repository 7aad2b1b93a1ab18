"""Stochastic rounding: between the neighbours, right on average; and steps that bfloat16 alone would lose."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from families import build, tokens
from live import losses_in_place
from s2ft import S2FTConfig, S2FTError
from s2ft.training.rounding import round_steps, round_stochastically


def test_goes_to_a_neighbour_and_is_right_on_average() -> None:
    values = torch.randn(50) * torch.logspace(-6, 6, 50)
    samples = torch.stack([round_stochastically(values) for _ in range(4000)]).double()
    nearest = values.bfloat16().double()
    gap = (torch.ldexp(torch.ones(50), torch.frexp(values).exponent - 8)).double()  # between neighbours
    assert ((samples - values.double()).abs() < gap).all()
    assert (samples != nearest).any()
    standard_error = gap / 2 / 4000**0.5
    assert ((samples.mean(0) - values.double()).abs() < 6 * standard_error).all()


def test_values_that_bfloat16_holds_stay() -> None:
    exact = torch.cat([torch.randn(100).bfloat16().float(), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40])])
    exact[-1] = torch.tensor(2.0**-133)  # subnormal in both
    assert torch.equal(round_stochastically(exact).float(), exact)
    assert round_stochastically(torch.tensor([torch.nan])).isnan().all()
    transposed = torch.randn(3, 4).bfloat16().float().T
    assert torch.equal(round_stochastically(transposed).float(), transposed)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(S2FTError, match="float64"):
        round_stochastically(torch.zeros(2, dtype=torch.float64))


def trajectory(
    make: Callable[[Any], Optimizer], dtype: torch.dtype, rounded: bool, steps: int
) -> tuple[Tensor, Optimizer]:
    """A parameter that starts at 1 (each entry) and is pulled towards 0 by the same small gradient."""
    parameter = nn.Parameter(torch.ones(2000, dtype=dtype))
    optimizer = make([parameter])
    if rounded:
        round_steps(optimizer)
    for _ in range(steps):
        parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
        assert parameter.dtype == parameter.grad.dtype == dtype
    return parameter.detach().float(), optimizer


@pytest.mark.parametrize(
    "make",
    [lambda p: SGD(p, lr=1e-3, momentum=0.5), lambda p: AdamW(p, lr=2e-4, fused=True), lambda p: AdamW(p, lr=2e-4)],
    ids=["sgd", "fused", "adamw"],
)
def test_steps_that_bfloat16_loses_are_kept_on_average(make: Callable[[Any], Optimizer]) -> None:
    exact, _ = trajectory(make, torch.float32, False, 50)
    lost, _ = trajectory(make, torch.bfloat16, False, 50)
    ours, optimizer = trajectory(make, torch.bfloat16, True, 50)
    moved = 1 - exact[0].item()
    assert torch.equal(lost, torch.ones(2000))
    assert abs((1 - ours.mean().item()) / moved - 1) < 0.1
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.ndim]
    assert states
    assert {value.dtype for value in states} == {torch.bfloat16}


def test_after_a_step_that_raised_the_next_takes_the_new_gradient() -> None:
    class Fails(SGD):
        steps = 0

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.steps += 1
            if self.steps == 1:
                raise torch.OutOfMemoryError("no room for states")
            super().step(closure)

    parameter = nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
    optimizer = Fails([parameter], lr=0.5)
    round_steps(optimizer)
    parameter.grad = torch.full_like(parameter, 1.0)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    optimizer.zero_grad()
    (parameter * -1.0).sum().backward()
    optimizer.step()
    assert parameter.dtype == parameter.grad.dtype == torch.bfloat16
    assert torch.equal(parameter.detach().float(), torch.full((50,), 1.5))


def test_states_go_through_a_checkpoint() -> None:
    make = lambda parameters: AdamW(parameters, lr=1e-2)  # noqa: E731
    parameter, optimizer = trajectory(make, torch.bfloat16, True, 3)
    again = nn.Parameter(parameter.bfloat16())
    other = make([again])
    round_steps(other)
    other.load_state_dict(optimizer.state_dict())
    again.grad = torch.full_like(again, 0.5)
    other.step()
    assert (again.detach().float() < parameter).float().mean() > 0.5


def test_other_parameters_are_left_to_the_optimizer() -> None:
    wide, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = SGD([wide, idle], lr=0.1)
    round_steps(optimizer)
    wide.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(wide.detach(), torch.ones(3) - 0.1)
    assert torch.equal(idle.detach(), torch.ones(3, dtype=torch.bfloat16))


def test_trains_bf16_deltas_in_place() -> None:
    base = build("mistral", torch.bfloat16)
    model = get_peft_model(base, S2FTConfig(ratios=0.3, seed=2), autocast_adapter_dtype=False).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    optimizer = AdamW(parameters, lr=5e-3)
    round_steps(optimizer)
    ids = tokens(4, 9)
    losses = losses_in_place(model, optimizer, ids)
    assert losses[-1] < losses[0] - 0.2
    with torch.no_grad():
        assert abs(model(input_ids=ids, labels=ids).loss.item() - losses[-1]) < 0.2
