"""A frozen quantised layer: its values, its gradient, and that nothing is saved for it."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantised import library
from s2ft.common.errors import S2FTError
from s2ft.format.slices import Slice
from s2ft.layer.dequantise import dequantise, keep_trainable, values_of
from s2ft.layer.linear import S2FTLinear
from s2ft.runtime.memory import saved_bytes


class Hoarding(torch.autograd.Function):
    """Keeps the whole input where no hook sees it, as bitsandbytes' int8 does, and gives no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.x = x
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


class Coded(nn.Module):
    """Like GPTQ's and AWQ's: no `weight`, but codes in buffers, in a shape of their own."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("qweight", torch.randint(-7, 8, (inputs * outputs,), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(outputs) + 0.5)
        self.bias = nn.Parameter(torch.randn(outputs), requires_grad=False) if bias else None

    @property
    def values(self) -> Tensor:
        return self.qweight.view(self.out_features, self.in_features) * self.scales[:, None]

    def forward(self, x: Tensor) -> Tensor:
        y = Hoarding.apply(x, self.values.to(x.dtype))
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("bias", [False, True])
def test_the_values_of_an_unknown_layer_are_what_it_makes_of_unit_vectors(bias: bool) -> None:
    layer = Coded(11, 6, bias)
    own = layer.bias
    assert torch.equal(values_of(layer), layer.values)
    assert layer.bias is own


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_dequantised_layer(side: str, bias: bool) -> None:
    base = Coded(11, 6, bias)
    layer = S2FTLinear(base, "a", Slice(side, np.array([0, 2, 5])), init_weights=False)
    x = torch.randn(2, 3, 11, requires_grad=True)
    y = layer(x)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    weight = (base.values + layer.get_delta_weight("a")).double().requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = exact @ weight.T + (0 if base.bias is None else base.bias)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    expected.backward(cotangent.double())
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
    block = layer.block("a")
    sliced = weight.grad.index_select(block.dim, block.indices)
    torch.testing.assert_close(block.weight.grad.double(), sliced, rtol=1e-5, atol=1e-5)


def test_only_the_selected_activations_are_kept() -> None:
    base = Coded(64, 48)
    layer = S2FTLinear(base, "a", Slice("in", np.array([3, 7, 50])))
    source = torch.randn(5, 64, requires_grad=True)
    own = [layer.block("a").weight, layer.block("a").indices]
    assert saved_bytes(lambda: layer(source).sum(), own) == 5 * 3 * 4
    x = source * 1.0  # which saves nothing of itself
    seen = weakref.ref(x)
    y = layer(x)
    del x
    gc.collect()
    assert seen() is None
    y.sum().backward()
    torch.testing.assert_close(source.grad, base.values.sum(0).expand(5, -1))


def test_what_trains_inside_keeps_its_own_gradient() -> None:
    base = Coded(11, 6)
    base.bias.requires_grad_(True)
    layer = S2FTLinear(base, "a", Slice("in", np.array([1, 4])))
    layer(torch.randn(2, 11, requires_grad=True)).sum().backward()
    torch.testing.assert_close(base.bias.grad, torch.full((6,), 2.0))


def test_dequantising_makes_plain_layers_of_the_same_values() -> None:
    model = nn.ModuleDict({"a": Coded(11, 6), "b": nn.Linear(6, 3), "c": nn.ModuleList([Coded(3, 4, bias=False)])})
    expected, biases = [model["a"].values, model["c"][0].values], model["a"].bias
    dequantise(model, torch.float64)
    assert [type(m) for m in (model["a"], model["b"], model["c"][0])] == 3 * [nn.Linear]
    for layer, values in zip((model["a"], model["c"][0]), expected, strict=True):
        assert torch.equal(layer.weight, values.double())
        assert not layer.weight.requires_grad
    assert torch.equal(model["a"].bias, biases.double())
    assert model["c"][0].bias is None


def test_a_layer_that_nobody_can_read_is_named_and_stays() -> None:
    model = nn.ModuleDict({"a": Coded(11, 6), "b": Coded(6, 3)})
    model["b"].forward = lambda x: x[..., :3] @ "no kernel"
    with pytest.raises(
        S2FTError, match=r"^b: the weight is quantised \(Coded\), stored as torch.int8, and cannot be read"
    ):
        dequantise(model, torch.float32)
    assert isinstance(model["b"], Coded)


def test_an_evaluation_does_not_end_the_training_of_nf4_on_a_cpu() -> None:
    bnb = library("bitsandbytes").nn
    layer = bnb.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.Params4bit(torch.randn(32, 64), requires_grad=False, quant_type="nf4")
    layer, x = layer.to("cpu"), torch.randn(4, 64)
    expected = values_of(layer)
    layer.eval()(x)  # on a CPU that multiplies bf16, this repacks the weight
    keep_trainable(layer)
    torch.testing.assert_close(values_of(layer), expected, rtol=0.01, atol=0.01)  # the scales, in bf16
    layer.eval()(x)
    layer.train()(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(x.grad, expected.sum(0).expand(4, -1), rtol=0.02, atol=0.02)
