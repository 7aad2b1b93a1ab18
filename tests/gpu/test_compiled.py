"""torch.compile on a GPU, by Inductor: an adapted model computes and trains as it does without."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

import s2ft
from live import logits
from on_gpu import IS_CUDA, adapted, distance, error, random_tokens, slice_gradients

BACKEND = "inductor" if IS_CUDA else "aot_eager"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(model: torch.nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """By their names in an uncompiled model."""
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    named = model.named_parameters()
    return {name.replace("_orig_mod.", ""): p.grad.clone() for name, p in named if p.requires_grad}


@pytest.mark.parametrize("inside", [False, True], ids=["indexed", "in place"])
def test_training_steps_are_the_same(inside: bool) -> None:
    model, ids = adapted("llama", torch.float32).train(), random_tokens(3, 9)
    plain = copy.deepcopy(model)
    outcomes = []
    for one in (plain, model):
        with s2ft.in_place(one) if inside and one is model else torch.enable_grad():
            run = torch.compile(one, backend=BACKEND) if one is model else one
            steps = SGD([p for p in one.parameters() if p.requires_grad], lr=0.5)
            for _ in range(2):
                found = gradients(run, ids)
                steps.step()
            outcomes.append(found)
    assert distance(outcomes[1], outcomes[0]) < 2e-3
    assert distance(slice_gradients(model, ids), slice_gradients(plain, ids)) < 2e-3  # eager again


def test_one_compiled_model_serves_every_adapter() -> None:
    model, ids = adapted("llama", torch.float32, adapters=3).eval(), random_tokens(2, 9)
    names = ["default", "a1", "a2", None, "a1"]
    expected = []
    for name in names:
        s2ft.switch(model, name)
        expected.append(logits(model, ids))
    compiled = torch.compile(model, backend=BACKEND)
    for name, output in zip(names, expected, strict=True):
        s2ft.switch(model, name)
        assert error(logits(compiled, ids), output) < 1e-4
    assert error(expected[0], expected[1]) > 0.01
