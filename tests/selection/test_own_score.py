"""A user's own score: what it is called with, what comes of it, and what is refused; and the registry of scores."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from families import build, tokens
from s2ft import S2FTConfig, S2FTError, fuse, select
from s2ft.adapters.file import read_adapter
from s2ft.adapters.inspection import summary
from s2ft.format.terms import STRATEGIES
from s2ft.layer.linears import weight_matrix
from s2ft.selection.scores import SCORES
from s2ft.selection.structure import find_structures
from s2ft.selection.units import Structure
from s2ft.selection.weight_scores import unit_weights

ATTENTION, MLP = "model.layers.{}.self_attn", "model.layers.{}.mlp"


def given(heads: list[float], channels: dict[int, float]) -> Callable[..., dict[str, Any]]:
    """The same scores in every layer: of the heads, and of some channels; other channels score 0."""

    def scores(structures: list[Structure], model: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
        of_channels = [channels.get(channel, 0.0) for channel in range(44)]
        return {s.key: torch.tensor(heads if s.kind == "attention" else of_channels) for s in structures}

    return scores


def test_the_channels_are_those_of_a_ranking_made_by_hand() -> None:
    """Llama: 4 heads of 10 channels, 2 groups; 44 channels of the MLP; 3 layers."""
    rank = given([0.1, 0.4, 0.3, 0.2], {7: 3.0, 40: 1.0, 12: 2.0, 13: -5.0})
    config = S2FTConfig(ratios={"o_proj": 0.5, "down_proj": 3 / 44})
    slices = select(build("llama"), config, scores=rank).config.slices
    assert slices == {
        **{ATTENTION.format(layer) + ".o_proj": "in 10-29" for layer in range(3)},
        **{MLP.format(layer) + ".down_proj": "in 7,12,40" for layer in range(3)},
    }
    smallest = S2FTConfig(ratios={"o_proj": 0.5, "down_proj": 1 / 44}, subset="smallest")
    slices = select(build("llama"), smallest, scores=rank).config.slices
    assert slices[ATTENTION.format(1) + ".o_proj"] == "in 0-9,30-39"
    assert slices[MLP.format(1) + ".down_proj"] == "in 13"


def test_groups_are_ranked_by_the_mean_of_their_heads() -> None:
    rank = given([0.0, 0.7, 0.4, 0.4], {})  # means 0.35 and 0.4
    slices = select(build("llama"), S2FTConfig(ratios={"v_proj": 0.5, "o_proj": 0.25}), scores=rank).config.slices
    assert slices[ATTENTION.format(0) + ".v_proj"] == "out 10-19"
    assert slices[ATTENTION.format(0) + ".o_proj"] == "in 20-29"  # of two alike, the first


def test_global_allocation_compares_over_the_layers() -> None:
    def deeper_first(structures: list[Structure], model: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
        return {s.key: [s.layer] * s.units for s in structures}

    config = S2FTConfig(ratios={"down_proj": 1 / 3}, allocation="global")
    assert select(build("llama"), config, scores=deeper_first).config.slices == {
        MLP.format(2) + ".down_proj": "in 0-43"
    }


def test_the_function_gets_targets_model_and_batches_in_evaluation_mode_and_all_is_put_back() -> None:
    model = build("llama").train()
    batches, seen = [{"input_ids": tokens(1, 4)}], {}

    def score(structures: list[Structure], inner: nn.Module, data: Iterable[Any]) -> dict[str, Any]:
        seen.update(keys=[s.key for s in structures], model=inner, data=data)
        assert not any(m.training for m in inner.modules())
        assert not any(p.requires_grad for p in inner.parameters())
        return {s.key: np.arange(s.units) for s in structures}

    config = S2FTConfig(ratios={"down_proj": 0.5}, layers=[0, 2])
    select(model, config, batches, scores=score)
    assert seen == {"keys": [MLP.format(0) + ":mlp", MLP.format(2) + ":mlp"], "model": model, "data": batches}
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    select(model, config, scores=score)
    assert list(seen["data"]) == []


def test_what_fails_inside_the_function_leaves_the_model_as_it_was() -> None:
    model = build("llama").train()

    def fails(structures: list[Structure], model: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        select(model, S2FTConfig(ratios=0.5), scores=fails)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_the_adapter_says_own_and_loads_without_the_function(tmp_path: Path) -> None:
    chosen = select(build("llama"), S2FTConfig(ratios=0.5), scores=given([1, 2, 3, 4], {})).config
    assert (chosen.strategy, chosen.seed) == ("own", None)
    torch.manual_seed(0)
    base = build("llama")
    state = {name: value.clone() for name, value in base.state_dict().items()}
    chosen.init_weights = False
    model, x = get_peft_model(base, chosen), tokens(2, 6)
    logits = model(x).logits
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
    fresh = build("llama")
    fresh.load_state_dict(state)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "one")
    assert loaded.peft_config["default"].strategy == "own"
    assert loaded.peft_config["default"].slices == chosen.slices
    assert torch.equal(loaded(x).logits, logits)
    assert summary(read_adapter(tmp_path / "one"))["strategy"] == "own"
    fuse([tmp_path / "one", tmp_path / "two"], [0.5, 0.5], output=tmp_path / "both")
    assert S2FTConfig.from_pretrained(str(tmp_path / "both")).slices == chosen.slices


def changed(**parts: Any) -> Callable[..., Any]:
    """A score whose first structure gets something else."""

    def score(structures: list[Structure], model: nn.Module, batches: Iterable[Any]) -> Any:
        right: dict[str, Any] = {s.key: torch.ones(s.units) for s in structures}
        first = structures[0]
        return {**right, first.key: parts["make"](first)} if "make" in parts else parts["whole"](right, first)

    return score


WRONG = {
    r"gave the shape \[5\] for .*self_attn:attention; one number for each of its 4 units": changed(
        make=lambda s: torch.ones(s.units + 1)
    ),
    r"gave the shape \[\] for": changed(make=lambda s: torch.tensor(1.0)),
    r"gave something else for": changed(make=lambda s: ["a"] * s.units),
    r"gave something else for .*": changed(make=lambda s: torch.ones(s.units, dtype=torch.complex64)),
    r"gave .* scores that are not finite": changed(make=lambda s: torch.full([s.units], torch.nan)),
    r"gave .*:attention scores that are not finite": changed(
        make=lambda s: torch.full([s.units], 1e300, dtype=torch.float64)
    ),
    r"gave no scores for model.layers.0.self_attn:attention, which has 4 units": changed(
        whole=lambda right, first: {key: value for key, value in right.items() if key != first.key}
    ),
    r"scored 'lm_head', which is the key of no structure": changed(whole=lambda right, _: {**right, "lm_head": [1]}),
    r"returned a list; a mapping": changed(whole=lambda right, _: list(right.values())),
}


def test_numbers_of_every_kind_are_taken() -> None:
    for kind in (torch.float64, torch.bfloat16, torch.int64, torch.bool):
        rank = changed(make=lambda s, kind=kind: torch.tensor([0, 1, 0, 1]).to(kind))
        slices = select(build("llama"), S2FTConfig(ratios={"o_proj": 0.5}), scores=rank).config.slices
        assert slices[ATTENTION.format(0) + ".o_proj"] == "in 10-19,30-39"


@pytest.mark.parametrize("message", WRONG)
def test_scores_that_are_not_one_finite_number_for_each_unit_are_refused(message: str) -> None:
    with pytest.raises(S2FTError, match=rf"scores=score {message}"):
        select(build("llama"), S2FTConfig(ratios=0.5), scores=WRONG[message])


def test_two_ways_to_choose_at_once_are_refused() -> None:
    model, rank = build("llama"), given([1, 2, 3, 4], {})
    with pytest.raises(S2FTError, match=r"strategy='weight' and scores= are both given; give one"):
        select(model, S2FTConfig(ratios=0.5, strategy="weight"), scores=rank)
    with pytest.raises(S2FTError, match=r"scores='weight' is not callable"):
        select(model, S2FTConfig(ratios=0.5), scores="weight")  # type: ignore[arg-type]
    with pytest.raises(S2FTError, match=r"channels are chosen already"):
        select(model, select(model, S2FTConfig(ratios=0.5), scores=rank).config, scores=rank)
    with pytest.raises(S2FTError, match=r"strategy='own' is filled in by s2ft.select\(.*scores"):
        S2FTConfig(ratios=0.5, strategy="own")


def test_a_units_weights_are_its_rows_or_columns() -> None:
    model = build("phi3")  # fused q, k, v and gate, up
    for structure in find_structures(model):
        for p in structure.projections:
            matrix = weight_matrix(model.get_submodule(p.module)).detach()
            found = unit_weights(p, model)
            for unit in range(p.units):
                at = slice(p.offset + unit * p.width, p.offset + (unit + 1) * p.width)
                assert torch.equal(found[unit], matrix[at] if p.side == "out" else matrix[:, at].T)


def test_the_registry_and_the_names_that_the_command_line_knows_agree() -> None:
    assert list(SCORES) == list(STRATEGIES)
    assert {need for score in SCORES.values() for need in score.needs} == {"weights", "activations", "gradients"}


@pytest.mark.parametrize("strategy", SCORES)
def test_a_strategy_runs_the_model_as_it_says(strategy: str) -> None:
    model, runs = build("llama"), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    select(model, S2FTConfig(ratios=0.5, strategy=strategy), [{"input_ids": tokens(1, 5)}])
    assert bool(runs) == SCORES[strategy].needs_data
