"""Gradients, steps and the way back on a GPU, outside and inside `in_place`, against full autograd in float64 on the CPU."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from live import logits, losses_in_place, same
from on_gpu import (
    DEVICE,
    IS_CUDA,
    adapted,
    base_values,
    dense,
    dense_gradients,
    distance,
    error,
    random_tokens,
    slice_gradients,
)
from s2ft import in_place
from s2ft.training.rounding import round_steps, round_stochastically

FAMILIES = ["llama", "qwen3", "gemma3", "phi3", "gpt2"]
DTYPES = [torch.float32, torch.bfloat16]
WAYS = {"indexed": nullcontext, "in place": in_place}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_gradients_are_those_of_full_autograd(family: str, way: str, dtype: torch.dtype) -> None:
    model, ids = adapted(family, dtype), random_tokens(3, 11)
    exact = dense(model)
    expected = dense_gradients(exact, model, ids)
    with WAYS[way](model):
        output, ours = model(ids).logits, slice_gradients(model, ids)
        assert all(p.grad.device.type == DEVICE.type for p in model.parameters() if p.requires_grad)
    most = 2e-4 if dtype == torch.float32 else 0.08
    assert error(output, exact(ids.cpu()).logits) < most
    assert distance(ours, expected) < most
    if dtype == torch.bfloat16:  # no worse than what autograd of a plain bf16 model gives on this device
        plain = dense(model).to(DEVICE, dtype)
        assert distance(ours, expected) < 2 * distance(dense_gradients(plain, model, ids), expected) + 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_place_equals_indexed_and_comes_back(family: str, dtype: torch.dtype) -> None:
    model, ids = adapted(family, dtype), random_tokens(2, 9)
    before = base_values(model)
    expected, gradients = logits(model, ids), slice_gradients(model, ids)
    with model.disable_adapter():
        plain = logits(model, ids)
    with in_place(model):
        assert any(not torch.equal(value, before[name]) for name, value in base_values(model).items())
        inside, inside_gradients = logits(model, ids), slice_gradients(model, ids)
        with model.disable_adapter():
            base = logits(model, ids)
    most = 1e-4 if dtype == torch.float32 else 0.05
    assert error(inside, expected) < most
    assert error(base, plain) < most
    assert error(plain, expected) > 5 * most
    assert distance(inside_gradients, gradients) < most
    assert same(base_values(model), before)
    assert torch.equal(logits(model, ids), expected)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: AdamW(parameters, lr=1e-3, weight_decay=0.1),
    "fused": lambda parameters: AdamW(parameters, lr=1e-3, fused=True),
}


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def take_steps(model: nn.Module, batches: list[Tensor], make: Callable[[Any], Optimizer]) -> dict[str, Tensor]:
    """What the steps change each delta by."""
    before, optimizer = trained(model), make([p for p in model.parameters() if p.requires_grad])
    for ids in batches:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value - before[name] for name, value in trained(model).items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_in_place_equal_those_beside_the_weights(optimizer: str, dtype: torch.dtype) -> None:
    model, batches = adapted("llama", dtype).train(), [random_tokens(3, 9) for _ in range(12)]
    other, before = copy.deepcopy(model), base_values(model)
    expected = take_steps(model, batches, OPTIMIZERS[optimizer])
    with in_place(other):
        ours = take_steps(other, batches, OPTIMIZERS[optimizer])
    assert distance(ours, expected) < (5e-3 if dtype == torch.float32 else 0.2)
    assert same(base_values(other), before)
    assert {p.dtype for p in trained(other).values()} == {torch.float32}


def test_autocast_gives_fp32_gradients() -> None:
    model, ids = adapted("llama", torch.float32), random_tokens(3, 11)
    expected = dense_gradients(dense(model), model, ids)
    for way in WAYS.values():
        with way(model), torch.autocast(DEVICE.type, torch.bfloat16):
            ours = slice_gradients(model, ids)
        assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert distance(ours, expected) < 0.08


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layers", [None, "last:1"])
def test_checkpointing_gives_the_same_gradients(layers: str | None, reentrant: bool) -> None:
    model, ids = adapted("llama", torch.float32, layers=layers).train(), random_tokens(2, 9)
    expected = slice_gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for way in WAYS.values():
        with way(model):
            assert distance(slice_gradients(model, ids), expected) < 1e-4


def test_rounding_goes_to_a_neighbour_and_is_right_on_average() -> None:
    values = (torch.randn(50) * torch.logspace(-6, 6, 50)).to(DEVICE)
    samples = torch.stack([round_stochastically(values) for _ in range(4000)]).double()
    gap = torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent - 8).double()  # between neighbours
    assert ((samples - values.double()).abs() < gap).all()
    assert (samples != values.bfloat16().double()).any()
    assert ((samples.mean(0) - values.double()).abs() < 6 * gap / 2 / 4000**0.5).all()
    exact = torch.cat([torch.randn(99).bfloat16().float(), torch.tensor([0.0, -0.0, torch.inf, -torch.inf])]).to(DEVICE)
    assert torch.equal(round_stochastically(exact).float(), exact)
    assert round_stochastically(torch.tensor([torch.nan], device=DEVICE)).isnan().all()


@pytest.mark.parametrize(
    "make",
    [lambda p: SGD(p, lr=1e-3, momentum=0.5), lambda p: AdamW(p, lr=2e-4, fused=True), lambda p: AdamW(p, lr=2e-4)],
    ids=["sgd", "fused", "adamw"],
)
def test_steps_that_bf16_loses_are_kept_on_average(make: Callable[[Any], Optimizer]) -> None:
    ends = {}
    for name, dtype in {"exact": torch.float32, "lost": torch.bfloat16, "ours": torch.bfloat16}.items():
        parameter = nn.Parameter(torch.ones(4000, dtype=dtype, device=DEVICE))
        optimizer = make([parameter])
        if name == "ours":
            round_steps(optimizer)
        for _ in range(50):
            parameter.grad = torch.full_like(parameter, 0.5)
            optimizer.step()
        ends[name] = parameter.detach().double()
    assert (ends["lost"] == 1).all()
    moved = 1 - ends["exact"].mean().item()
    assert abs((1 - ends["ours"].mean().item()) / moved - 1) < 0.1


def test_bf16_deltas_train_in_place_in_rounded_steps() -> None:
    model = adapted("mistral", torch.bfloat16, ratios=0.3).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    before, ids = base_values(model), random_tokens(4, 9)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, fused=IS_CUDA)
    round_steps(optimizer)
    losses = losses_in_place(model, optimizer, ids)
    assert {p.dtype for p in trained(model).values()} == {torch.bfloat16}
    assert losses[-1] < losses[0] - 0.2
    assert same(base_values(model), before)
