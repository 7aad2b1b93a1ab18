"""Slices of stacked experts against full autograd of a model that has them in its weights; and what they keep for backward."""

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from mixtures import CONFIGS, mixture, text
from s2ft import S2FTConfig, S2FTError, in_place
from s2ft.layer.experts import S2FTExperts
from s2ft.layer.linear import sliced_layers
from s2ft.layer.stacked import StackedLinear, find_experts, stacked_linear
from s2ft.runtime.memory import own_tensors, saved_bytes
from s2ft.training.in_place import enter

GATED = {"gate_proj": 0.3, "up_proj": 0.3, "down_proj": 0.4}
EVERY = {**dict.fromkeys(CONFIGS, GATED), "nemotron-h": {"up_proj": 0.3, "down_proj": 0.4}}


def adapted(model: PreTrainedModel, **options: Any) -> PeftModel:
    """Random deltas on random channels, of which each expert may have another number."""
    config = S2FTConfig(seed=int(torch.randint(1000, ())), allocation="global", init_weights=False, **options)
    tuned = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(10 if parameter.requires_grad else 1)  # deltas as large as the weights
    return tuned


def places(linear: StackedLinear, side: str, index: int) -> tuple[Any, ...]:
    """Where a channel lies in the parameter: written out, without the library's own arithmetic."""
    parameter = linear.weight
    transposed = linear.experts.is_transposed
    axis = {("in", False): 2, ("in", True): 1, ("out", False): 1, ("out", True): 2}[side, transposed]
    expert, channel = divmod(index, parameter.shape[axis])
    return (expert, slice(None), channel) if axis == 2 else (expert, channel)


def with_deltas(model: PreTrainedModel, tuned: PeftModel) -> tuple[PreTrainedModel, dict[str, list[tuple[str, Any]]]]:
    """The model with the deltas in its weights, all of which want gradients; slice → parameter and place of each channel."""
    dense = copy.deepcopy(model)
    found: dict[str, list[tuple[str, Any]]] = {}
    with torch.no_grad():
        for path, layer in sliced_layers(tuned.get_base_model(), "default").items():
            block, linear = layer.block("default"), layer.get_base_layer()
            stacked = isinstance(linear, StackedLinear)
            name = path if stacked else f"{path}.weight"
            for number, index in enumerate(block.indices.tolist()):
                place = places(linear, block.side, index) if stacked else ((slice(None), index), index)[block.dim == 0]
                delta = block.weight[:, number] if block.side == "in" else block.weight[number]
                dense.get_parameter(name)[place] += delta.to(model.dtype)
                found.setdefault(path, []).append((name, place))
    return dense.requires_grad_(True), found


def gradients_of(tuned: PeftModel) -> dict[str, Tensor]:  # slice → [s, features]
    layers = sliced_layers(tuned.get_base_model(), "default")
    blocks = {path: layer.block("default") for path, layer in layers.items()}
    return {path: b.weight.grad.T if b.side == "in" else b.weight.grad for path, b in blocks.items()}


@pytest.mark.parametrize("family", CONFIGS)
def test_slices_have_the_gradient_of_full_autograd(family: str) -> None:
    model, tokens = mixture(family), text()
    tuned = adapted(model, ratios=EVERY[family])
    dense, where = with_deltas(model, tuned)
    stacked = [path for path in where if path.endswith(".experts.down_proj")]
    assert stacked
    x, also = (model.get_input_embeddings()(tokens).requires_grad_() for _ in range(2))
    expected, found = dense(inputs_embeds=x).logits, tuned(inputs_embeds=also).logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # routers compute in float32
    direction = torch.randn_like(expected)
    (expected * direction).sum().backward()
    (found * direction).sum().backward()
    for path, gradient in gradients_of(tuned).items():
        full = torch.stack([dense.get_parameter(name).grad[place] for name, place in where[path]])
        assert full.any()
        torch.testing.assert_close(gradient, full, rtol=1e-6, atol=1e-6 * float(full.abs().max()))
    torch.testing.assert_close(also.grad, x.grad, rtol=1e-6, atol=1e-6 * float(x.grad.abs().max()))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whatever_runs_the_experts(implementation: str, dtype: torch.dtype) -> None:
    model = mixture("mixtral", torch.float32).to(dtype)
    experts = model.model.layers[0].mlp.experts
    x, index = torch.randn(9, 32, dtype=dtype), torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    weights = torch.rand(9, 2, dtype=dtype)
    tuned = adapted(model, ratios={"up_proj": 0.4, "down_proj": 0.4})
    dense, _ = with_deltas(copy.deepcopy(model).double(), tuned)
    expected = dense.model.layers[0].mlp.experts(x.double(), index, weights.double())
    tuned.base_model.model.set_experts_implementation(implementation)
    found = tuned.base_model.model.model.layers[0].mlp.experts(x, index, weights)
    error = (found.double() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)
    assert (experts(x, index, weights).double() - expected).norm() / expected.norm() > 0.05


def kept_by(experts: torch.nn.Module, *inputs: Tensor) -> int:
    """Bytes that a pass keeps for backward."""
    return saved_bytes(lambda: experts(*inputs), own_tensors(experts))


def test_what_is_kept_for_backward_is_as_wide_as_the_slice() -> None:
    model = mixture("mixtral", torch.float32)
    x, index = torch.randn(64, 32, requires_grad=True), torch.stack([torch.randperm(4)[:2] for _ in range(64)])
    weights = torch.rand(64, 2)
    base = kept_by(model.model.layers[0].mlp.experts, x, index, weights)
    tuned = get_peft_model(model, S2FTConfig(target_parameters=["experts.down_proj"], ratios=1 / 3, seed=0))
    ours = kept_by(tuned.base_model.model.model.layers[0].mlp.experts, x, index, weights)
    pairs, channels, matrices = 128, 8, 4 * 8 * 32
    routing = 8 * 4 * pairs  # token, expert, place and weight of each pair
    assert ours - base <= 4 * (3 * pairs * channels + matrices) + routing + 1024


def test_in_place_the_chosen_channels_alone_are_kept() -> None:
    model = mixture("mixtral", torch.float32)
    x, index = torch.randn(64, 32, requires_grad=True), torch.stack([torch.randperm(4)[:2] for _ in range(64)])
    weights = torch.rand(64, 2)
    base = kept_by(model.model.layers[0].mlp.experts, x, index, weights)
    tuned = get_peft_model(model, S2FTConfig(target_parameters=["experts.down_proj"], ratios=1 / 3, seed=0))
    experts = tuned.base_model.model.model.layers[0].mlp.experts
    with in_place(tuned):
        ours = kept_by(experts, x, index, weights)
    pairs, channels = 128, 8
    assert 4 * pairs * channels <= ours - base <= 4 * pairs * channels + 1024  # and where each delta has its place


def test_in_place_a_delta_that_changes_between_forward_and_backward_is_an_error() -> None:
    tuned = adapted(mixture("mixtral"), ratios={"down_proj": 0.4})
    with in_place(tuned):
        loss = tuned(text()).logits.square().sum()
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_copies_for_several_gpus_are_refused() -> None:
    experts = adapted(mixture("mixtral"), ratios={"down_proj": 0.4}).get_base_model().model.layers[0].mlp.experts
    with pytest.raises(S2FTError, match=r"DataParallel.*a slice of stacked experts.*accelerate launch"):
        experts._replicate_for_data_parallel()


@pytest.mark.parametrize("family", CONFIGS)
def test_in_place_gradients_are_the_same(family: str) -> None:
    model, tokens = mixture(family), text()
    tuned = adapted(model, ratios=EVERY[family])
    before = {name: p.clone() for name, p in tuned.named_parameters()}

    def step(direction: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        tuned.zero_grad()
        x = model.get_input_embeddings()(tokens).requires_grad_()
        y = tuned(inputs_embeds=x).logits
        direction = torch.randn_like(y) if direction is None else direction
        (y * direction).sum().backward()
        found = {path: gradient.clone() for path, gradient in gradients_of(tuned).items()}
        return y.detach(), direction, {**found, "input": x.grad}

    outside, direction, expected = step()
    layout = enter(tuned, activations=False)  # its norms compute in float32
    try:
        inside, _, found = step(direction)
        assert {place.how for place in layout.placements if ".experts." in place.module} == {"gathered", "added"}
        with tuned.disable_adapter(), torch.no_grad():
            plain = tuned(tokens).logits
    finally:
        layout.leave()
    torch.testing.assert_close(inside, outside, rtol=1e-6, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(plain, model(tokens).logits, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in tuned.named_parameters())


def test_how_experts_are_stacked_is_read_off_them() -> None:
    experts = find_experts(mixture("gpt-oss").model.layers[0].mlp.experts)
    assert experts is not None
    assert (experts.is_transposed, experts.is_interleaved, experts.is_gated) == (True, True, True)
    assert (experts.count, experts.channels, experts.hidden) == (4, 24, 32)


def test_experts_of_another_kind_are_refused() -> None:
    plain = torch.nn.Linear(2, 2)
    assert find_experts(plain) is None
    assert stacked_linear(plain, "down_proj") is None
    experts = mixture("mixtral").model.layers[0].mlp.experts
    experts.has_post_expert_norm = True
    with pytest.raises(S2FTError, match=r"MixtralExperts has a norm behind each expert"):
        S2FTExperts(experts, None)
    experts.has_post_expert_norm = False
    experts.down_proj = torch.nn.Parameter(torch.zeros(4, 32, 23))
    with pytest.raises(S2FTError, match=r"of shapes \(4, 48, 32\) and \(4, 32, 23\), which do not match"):
        find_experts(experts)
