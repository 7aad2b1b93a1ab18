"""The trained slice against full autograd: its forward, its gradient, what it keeps for backward, and its merge."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from families import FAMILIES, build, tokens
from s2ft import S2FTConfig, S2FTError
from s2ft.format.slices import Slice
from s2ft.format.terms import PROJECTIONS
from s2ft.layer.linear import S2FTLinear
from s2ft.layer.linears import linear_layer, weight_matrix
from s2ft.selection.select import select
from s2ft.selection.structure import find_structures


def dense_weight(layer: S2FTLinear) -> Tensor:  # [out, in], float64, a leaf that requires its gradient
    """The reference: W + ΔW of all active adapters as one dense weight."""
    base = weight_matrix(layer.get_base_layer()).detach().double().clone()
    for name in layer.active_adapters:
        block = layer.s2ft_block[name]
        picked = (slice(None), block.indices) if block.side == "in" else block.indices
        base[picked] += block.weight.detach().double()
    return base.requires_grad_()


def random_layer(
    side: str, conv: bool, bias: bool, sizes: tuple[int, int], count: int, dtype: torch.dtype
) -> S2FTLinear:
    inputs, outputs = sizes
    base = Conv1D(outputs, inputs) if conv else nn.Linear(inputs, outputs, bias=bias)
    base = base.to(dtype).requires_grad_(False)
    nn.init.normal_(base.weight, std=0.5)
    channels = np.sort(
        np.random.default_rng(torch.initial_seed()).permutation(inputs if side == "in" else outputs)[:count]
    )
    layer = S2FTLinear(base, "default", Slice(side, channels), init_weights=False)
    assert layer.s2ft_block["default"].weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    nn.init.normal_(layer.s2ft_block["default"].weight, std=0.5)
    return layer


shapes = st.tuples(
    st.sampled_from(["in", "out"]),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_forward_and_gradients_equal_those_of_the_dense_weight(case: tuple) -> None:
    side, conv, bias, leading, sizes, input_grad = case
    count = 1 + sum(leading) % (sizes[0] if side == "in" else sizes[1])
    layer = random_layer(side, conv, bias, sizes, count, torch.float64)
    if conv and not leading:
        leading = (2,)
    x = torch.randn(*leading, sizes[0], dtype=torch.float64, requires_grad=input_grad)
    x_reference = x.detach().clone().requires_grad_()
    weight = dense_weight(layer)
    y, reference = layer(x), linear(x_reference, weight, layer.bias)
    torch.testing.assert_close(y, reference)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    reference.backward(cotangent)
    block = layer.s2ft_block["default"]
    torch.testing.assert_close(block.weight.grad, weight.grad.index_select(block.dim, block.indices))
    if input_grad:
        torch.testing.assert_close(x.grad, x_reference.grad)


IN_PHI = [name for name in PROJECTIONS if name != "out_proj"]
FUSED = [("phi3", name) for name in IN_PHI] + [("gpt2", name) for name in IN_PHI if name != "gate_proj"]


@pytest.mark.parametrize(("family", "projection"), FUSED)
def test_gradients_of_one_projection_alone_where_layers_are_fused(family: str, projection: str) -> None:
    base = build(family)
    model = get_peft_model(
        copy.deepcopy(base), S2FTConfig(ratios={projection: 0.3}, init_weights=False, task_type="CAUSAL_LM")
    )
    check_against_full_autograd(model, base)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_a_model_are_the_slices_of_full_autograd(family: str) -> None:
    base = build(family)
    names = {p.name for s in find_structures(base) for p in s.projections}
    config = S2FTConfig(ratios=dict.fromkeys(names, 0.3), init_weights=False, task_type="CAUSAL_LM")
    check_against_full_autograd(get_peft_model(copy.deepcopy(base), config), base)


def check_against_full_autograd(model: nn.Module, base: nn.Module) -> None:
    """The same loss on `base` with every delta added to its weights, all of them trained."""
    x = tokens(2, 11)
    layers = {
        name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, S2FTLinear)
    }
    for name, layer in layers.items():
        weight_matrix(linear_layer(base.get_submodule(name))).data.copy_(dense_weight(layer).data)
    loss, reference = model(x, labels=x).loss, base(x, labels=x).loss
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=1e-6)  # RMSNorm rounds to float32 inside
    loss.backward()
    reference.backward()
    assert layers
    for name, layer in layers.items():
        block = layer.s2ft_block["default"]
        gradient = linear_layer(base.get_submodule(name)).weight.grad
        gradient = gradient.T if isinstance(layer.get_base_layer(), Conv1D) else gradient
        expected = gradient.index_select(block.dim, block.indices)
        torch.testing.assert_close(
            block.weight.grad, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item() + 1e-12
        )
    assert all(p.grad is None for n, p in model.named_parameters() if "s2ft_" not in n)


@pytest.mark.parametrize("leading", [(5,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("side", ["in", "out"])
def test_gradcheck(side: str, leading: tuple[int, ...]) -> None:
    layer = random_layer(side, False, True, (6, 5), 3, torch.float64)
    x = torch.randn(*leading, 6, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, delta: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"s2ft_block.default.weight": delta}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.s2ft_block["default"].weight))


def saved_storages(layer: nn.Module, x: Tensor) -> dict[int, int]:
    """Storage → bytes of all that autograd keeps for backward, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_side_keeps_only_the_selected_activations(dtype: torch.dtype) -> None:
    layer = random_layer("in", False, True, (48, 40), 3, dtype)
    x = torch.randn(7, 5, 48, dtype=dtype, requires_grad=True)
    delta_copy = 0 if dtype == torch.float32 else 40 * 3 * 2  # the delta in the base's dtype
    assert sum(saved_storages(layer, x).values()) == 7 * 5 * 3 * dtype.itemsize + delta_copy


def test_output_side_keeps_the_input_itself_not_a_copy() -> None:
    layer = random_layer("out", False, True, (48, 40), 3, torch.float32)
    x = torch.randn(7, 5, 48, requires_grad=True)
    assert set(saved_storages(layer, x)) == {x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("shape", [(2, 16), (2, 3, 5), (7, 1)])
def test_a_frozen_delta_gives_the_bits_of_a_trained_one_however_the_input_lies(
    side: str, shape: tuple[int, ...]
) -> None:
    layer = random_layer(side, False, True, (32, 24), 16, torch.float32)
    frozen = copy.deepcopy(layer).requires_grad_(False)
    x = torch.randn(*shape, 32).transpose(0, -2)
    with torch.no_grad():
        assert torch.equal(frozen(x), layer(x))
    assert torch.equal(frozen(x), layer(x))


@pytest.mark.parametrize("side", ["in", "out"])
def test_fp32_delta_on_a_bf16_base(side: str) -> None:
    layer = random_layer(side, False, False, (33, 29), 5, torch.bfloat16)
    block = layer.s2ft_block["default"]
    x = torch.randn(9, 33).bfloat16().requires_grad_()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert block.weight.grad.dtype == torch.float32
    reference = linear(x.double(), dense_weight(layer))
    torch.testing.assert_close(y.double(), reference, rtol=0.03, atol=0.03 * reference.abs().max().item())


@pytest.mark.parametrize("side", ["in", "out"])
def test_autocast_computes_in_its_dtype_and_keeps_fp32_gradients(side: str) -> None:
    layer = random_layer(side, False, True, (33, 29), 5, torch.float32)
    x = torch.randn(2, 9, 33, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    cotangent = torch.randn(2, 9, 29)
    y.backward(cotangent.bfloat16())
    weight, x_reference = dense_weight(layer), x.detach().double().requires_grad_()
    linear(x_reference, weight, layer.bias.double()).backward(cotangent.double())
    block = layer.s2ft_block["default"]
    expected = weight.grad.index_select(block.dim, block.indices)
    assert block.weight.grad.dtype == x.grad.dtype == torch.float32
    torch.testing.assert_close(block.weight.grad.double(), expected, rtol=0.03, atol=0.03 * expected.abs().max().item())
    torch.testing.assert_close(
        x.grad.double(), x_reference.grad, rtol=0.03, atol=0.03 * x_reference.grad.abs().max().item()
    )


def test_a_backward_hook_on_the_base_layer_changes_nothing() -> None:
    layer = random_layer("in", False, True, (8, 7), 3, torch.float64)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    layer(x).square().sum().backward()
    expected = layer.s2ft_block["default"].weight.grad.clone()
    layer.zero_grad()
    layer.base_layer.register_full_backward_hook(lambda *_: None)
    layer(x.requires_grad_()).square().sum().backward()
    torch.testing.assert_close(layer.s2ft_block["default"].weight.grad, expected)


class _Dequantised(torch.autograd.Function):
    """x Wᵀ as a view that is made inside a Function, which is what bitsandbytes and quanto return."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return (x.reshape(-1, x.shape[-1]) @ weight.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.saved_tensors[0], None


class _Quantised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = _Dequantised.apply(x, self.weight)
        return y if self.bias is None else y.view(y.shape) + self.bias


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True], ids=["first layer", "further layer"])
@pytest.mark.parametrize("in_no_grad", [False, True])
def test_an_output_that_autograd_does_not_let_change(side: str, bias: bool, needs_grad: bool, in_no_grad: bool) -> None:
    base = _Quantised(9, 8, bias=bias).double().requires_grad_(False)
    if in_no_grad and not needs_grad:
        base.forward = torch.no_grad()(
            lambda x: nn.functional.linear(x, base.weight, base.bias).view(x.shape[0], -1, 8)
        )
    layer = S2FTLinear(base, "default", Slice(side, np.array([1, 4, 5])), init_weights=False)
    x = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=needs_grad)
    block = layer.s2ft_block["default"]
    expected = x @ (base.weight + layer.get_delta_weight("default")).T + (0 if base.bias is None else base.bias)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    dense = cotangent.flatten(0, 1).T @ x.detach().flatten(0, 1)
    torch.testing.assert_close(block.weight.grad, dense.index_select(block.dim, block.indices))
    if needs_grad:
        torch.testing.assert_close(x.grad, cotangent @ (base.weight + layer.get_delta_weight("default")))


def test_an_output_that_is_a_leaf_with_a_gradient() -> None:
    base = nn.Linear(9, 8, bias=False).requires_grad_(False)
    base.forward = lambda x: (x @ base.weight.T).requires_grad_()  # what bitsandbytes' Linear4bit gives on a CPU
    layer = S2FTLinear(base, "default", Slice("in", np.array([1, 4, 5])), init_weights=False)
    x = torch.randn(2, 3, 9)
    torch.testing.assert_close(layer(x), x @ (base.weight + layer.get_delta_weight("default")).T)


def test_two_active_adapters_on_different_sides() -> None:
    layer = random_layer("in", False, True, (8, 7), 3, torch.float64)
    layer.update_layer("other", Slice("out", np.array([1, 4])), init_weights=False)
    layer.set_adapter(["default", "other"])
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    x_reference = x.detach().clone().requires_grad_()
    weight = dense_weight(layer)
    cotangent = torch.randn(5, 7, dtype=torch.float64)
    layer(x).backward(cotangent)
    linear(x_reference, weight, layer.bias).backward(cotangent)
    torch.testing.assert_close(x.grad, x_reference.grad)
    for block in layer.s2ft_block.values():
        torch.testing.assert_close(block.weight.grad, weight.grad.index_select(block.dim, block.indices))


@settings(max_examples=40, deadline=None)
@given(
    side=st.sampled_from(["in", "out"]),
    conv=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    order=st.permutations(["a", "b", "c"]),
    merged=st.integers(1, 3),
)
def test_unmerge_restores_the_base_bit_for_bit(
    side: str, conv: bool, dtype: torch.dtype, order: list[str], merged: int
) -> None:
    layer = random_layer(side, conv, False, (9, 8), 4, dtype)
    for name in "abc":  # overlapping channels
        layer.update_layer(name, Slice(side, np.sort(np.random.permutation(8)[:3])), init_weights=False)
    before = layer.weight.clone()
    layer.merge(adapter_names=order[:merged])
    assert not torch.equal(layer.weight, before)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("conv", [False, True])
def test_merged_weight_is_base_plus_delta(side: str, conv: bool) -> None:
    layer = random_layer(side, conv, True, (9, 8), 4, torch.float64)
    weight, base = dense_weight(layer).detach(), layer.weight.clone()
    torch.testing.assert_close(
        weight_matrix(layer.base_layer)
        + (layer.get_delta_weight("default").T if conv else layer.get_delta_weight("default")),
        weight,
    )
    layer.merge()
    assert torch.equal(weight_matrix(layer.base_layer), weight)
    layer.unmerge()
    assert torch.equal(layer.weight, base)


def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing() -> None:
    layer = random_layer("in", False, False, (9, 8), 4, torch.float32)
    before = layer.weight.clone()
    layer.s2ft_block["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(S2FTError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before)
    assert not layer.merged


def test_a_slice_past_the_layer_is_refused() -> None:
    with pytest.raises(S2FTError, match=r"'in 3,12' reaches past the 9 channels of the layer's input side"):
        S2FTLinear(nn.Linear(9, 20), "default", Slice.parse("in 3,12"))


def test_selection_by_heads_covers_whole_heads() -> None:
    slices = select(build("llama"), S2FTConfig(ratios={"o_proj": 0.5}, seed=1)).slices
    assert all(len(chosen.indices) == 20 and (chosen.indices[::10] % 10 == 0).all() for chosen in slices.values())
