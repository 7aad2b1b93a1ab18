"""Which channels of which experts are trained."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from mixtures import mixture, text
from s2ft import S2FTConfig, select
from s2ft.selection.scores import score_units
from s2ft.selection.structure import read_structures
from s2ft.selection.units import EXPERTS

DOWN, UP = (f"model.layers.0.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj"))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return mixture("mixtral", torch.float32)


def counts(model: PreTrainedModel, path: str, size: int, **options: object) -> list[int]:
    """How many channels each of the 4 experts of a block trains."""
    batches = [{"input_ids": text()}] if options.get("strategy") in ("activation", "product") else None
    chosen = select(model, S2FTConfig(**options), batches).slices[path]
    return np.bincount(chosen.indices // size, minlength=4).tolist()


def test_each_expert_trains_as_many_channels(model: PreTrainedModel) -> None:
    assert counts(model, DOWN, 24, ratios=0.25) == [6, 6, 6, 6]
    assert counts(model, DOWN, 24, ratios=0.3, seed=1) == [7, 7, 8, 7]
    assert counts(model, DOWN, 24, target_parameters=["experts.2.down_proj"], ratios=0.5) == [0, 0, 12, 0]
    assert counts(model, UP, 48, ratios={"gate_proj": 0.25, "up_proj": 0.25, "down_proj": 0.25}) == [12] * 4


def test_gate_up_and_down_of_an_expert_are_coupled(model: PreTrainedModel) -> None:
    ratios = {"gate_proj": 0.25, "up_proj": 0.25, "down_proj": 0.25}
    for name in ("mixtral", "gpt-oss"):
        slices = select(mixture(name), S2FTConfig(ratios=ratios, seed=2)).slices
        rows, columns = slices[UP].indices, slices[DOWN].indices
        inside = rows % 48 // 2 if name == "gpt-oss" else rows % 48 % 24
        assert np.unique(rows // 48 * 24 + inside).tolist() == columns.tolist()


def test_the_largest_weights_of_an_experts_channel(model: PreTrainedModel) -> None:
    experts = model.model.layers[0].mlp.experts
    gate, up = experts.gate_up_proj.double().chunk(2, dim=1)
    squares = gate.square().sum(2) + up.square().sum(2) + experts.down_proj.double().square().sum(1)
    best = squares.topk(6, dim=1).indices.sort().values + 24 * torch.arange(4)[:, None]
    chosen = select(model, S2FTConfig(ratios=0.25, strategy="weight")).slices[DOWN]
    assert chosen.indices.tolist() == best.flatten().tolist()


@pytest.mark.parametrize("strategy", ["weight", "random"])
def test_a_budget_goes_to_experts_by_score(model: PreTrainedModel, strategy: str) -> None:
    split = counts(model, DOWN, 24, ratios=0.25, allocation="global", strategy=strategy, seed=0)
    assert len(set(split)) > 1


def test_every_way_to_stack_is_read() -> None:
    for family, experts in {"mixtral": 8, "qwen3-moe": 5, "gpt-oss": 8, "llama4": 6, "nemotron-h": 4}.items():
        structures = [s for s in read_structures(mixture(family)).structures if s.kind == EXPERTS]
        assert len(structures) == experts
        for name in {p.module for s in structures for p in s.projections}:
            channels = np.concatenate([p.grid.ravel() for s in structures for p in s.projections if p.module == name])
            assert np.sort(channels).tolist() == list(range(len(channels)))  # each once, and none left out


def test_all_linear_layers_are_those_of_experts_too(model: PreTrainedModel) -> None:
    assert {DOWN, UP} <= set(select(model, S2FTConfig(target_modules="all-linear", ratios=0.5)).slices)
    assert not {DOWN, UP} & set(select(model, S2FTConfig(target_modules=["o_proj"], ratios=0.5)).slices)
    kept = select(
        model, S2FTConfig(exclude_modules=[r"experts.down_proj"], target_modules=["o_proj", "down_proj"], ratios=0.5)
    )
    assert not any("experts" in path for path in kept.slices)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "llama4"])
def test_scores_that_read_data_are_those_of_each_expert(family: str) -> None:
    """Against the experts' own inputs, run one by one, and against full autograd."""
    model = mixture(family, torch.float64)
    tokens, mask = text(), torch.ones(2, 7, dtype=torch.int64)
    mask[0, 5:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    structures = [s for s in read_structures(model).structures if s.kind == EXPERTS and s.layer == 0]
    scores = {
        name: score_units(name, structures, model, [batch])
        for name in ("activation", "product", "saliency", "gradient")
    }
    weight = score_units("weight", structures, model)
    owner = model.get_submodule(structures[0].path.rpartition(".")[0])
    calls: list[Any] = []
    hook = owner.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((*args, *kwargs.values())), with_kwargs=True
    )
    down, into = owner.down_proj.requires_grad_(True), owner.gate_up_proj.requires_grad_(True)
    labels = tokens.masked_fill(mask == 0, -100)
    model(**batch, labels=labels).loss.backward()
    hook.remove()
    gradient, rows = down.grad, _channels(family, into.grad)
    for parameter in (down, into):
        parameter.requires_grad_(False).grad = None
    if family == "mixtral":
        down, gradient = down.mT, gradient.mT
    effects = (down * gradient).sum(2).abs()
    for number, structure in enumerate(structures):
        fed = by_hand(owner, calls[0], number)  # [tokens, channels]
        expected = fed[mask.flatten().bool()].square().mean(0).sqrt()
        found = torch.from_numpy(scores["activation"][structure.key]).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
        assert np.allclose(
            scores["product"][structure.key], scores["activation"][structure.key] * weight[structure.key]
        )
        torch.testing.assert_close(
            torch.from_numpy(scores["saliency"][structure.key]).double(), effects[number], rtol=1e-3, atol=1e-7
        )
        squares = gradient[number].square().sum(1) + rows[number].square().sum((0, 2))
        torch.testing.assert_close(
            torch.from_numpy(scores["gradient"][structure.key]).double(), squares.sqrt(), rtol=1e-3, atol=1e-7
        )


def _channels(family: str, gate_up: torch.Tensor) -> torch.Tensor:  # [experts, 2, channels, features]
    """Gate's and up's rows of each channel: one after the other, or in turns."""
    rows = gate_up if family == "mixtral" else gate_up.mT
    experts, both, features = rows.shape
    if family == "gpt-oss":
        return rows.reshape(experts, both // 2, 2, features).transpose(1, 2)
    return rows.reshape(experts, 2, both // 2, features)


def by_hand(owner: torch.nn.Module, call: Any, number: int) -> torch.Tensor:  # [tokens, channels]
    """What one expert feeds into its down for each token, with the routing weight; zero where it is not asked."""
    x, *routed = call
    up = owner.gate_up_proj[number]
    if not routed:
        gate, rest = (x.view(owner.num_experts, -1, x.shape[1])[number] @ up).chunk(2, -1)
        return owner.act_fn(gate) * rest
    rows = x @ (up if up.shape[0] == x.shape[1] else up.T)
    rows = rows + owner.gate_up_proj_bias[number] if hasattr(owner, "gate_up_proj_bias") else rows
    share = (routed[1] * (routed[0] == number)).sum(1, keepdim=True)
    return owner._apply_gate(rows) * share


def test_a_budget_by_activation_follows_the_routers_load(model: PreTrainedModel) -> None:
    """An expert that the router never asks for gets nothing."""
    lonely = copy.deepcopy(model)
    for block in lonely.model.layers:
        block.mlp.gate.register_forward_hook(never_second)
    split = counts(lonely, DOWN, 24, ratios={"down_proj": 0.25}, allocation="global", strategy="activation")
    assert split[1] == 0
    assert sum(split) > 0


def never_second(router: torch.nn.Module, args: Any, output: Any) -> Any:
    """The routing with expert 2 wherever it was expert 1."""
    *others, index = output
    return (*others, index.masked_fill(index == 1, 2))
