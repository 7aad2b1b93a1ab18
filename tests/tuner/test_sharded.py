"""A model that FSDP2 shards over two processes: it trains, saves, loads, merges and switches as one that is whole."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import s2ft
from families import VOCABULARY, build
from live import layers, logits, same
from s2ft import S2FTConfig, select
from two_processes import in_two

pytestmark = pytest.mark.usefixtures("one_thread")
RATIOS = {"q_proj": 0.5, "o_proj": 0.5, "up_proj": 0.2, "down_proj": 0.3}
STEPS = 20


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """As accelerate does: a unit for each block, and one for the rest."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for block in base.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for name, value in model.state_dict().items()
    }


def fit(model: nn.Module, batches: Tensor, steps: int = STEPS) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for ids in batches[:steps]:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def mine(batches: Tensor) -> Tensor:  # [steps, rows, length] → this process's rows
    return batches.chunk(2, dim=1)[distributed.get_rank()]


@pytest.fixture
def batches() -> Tensor:
    return torch.randint(3, VOCABULARY, (STEPS, 4, 7))


@pytest.mark.parametrize("reshard", [True, False])
def test_it_trains_and_saves_what_one_process_does(tmp_path: Path, batches: Tensor, reshard: bool) -> None:
    model = get_peft_model(build("llama", torch.float64), S2FTConfig(ratios=RATIOS))

    def in_each() -> None:
        sharded = fit(shard(copy.deepcopy(model), reshard_after_forward=reshard), mine(batches))
        sharded.save_pretrained(tmp_path / "adapter", is_main_process=distributed.get_rank() == 0)

    in_two(tmp_path, in_each)
    base = copy.deepcopy(model).unload()
    expected = fit(model, batches)
    found = PeftModel.from_pretrained(base, tmp_path / "adapter")
    for ours, theirs in zip(layers(found), layers(expected), strict=True):
        error = (ours.block("default").weight - theirs.block("default").weight).norm()
        assert error < 1e-6 * theirs.block("default").weight.norm()  # saved in fp32


def test_fp32_deltas_and_a_bf16_base_share_a_unit(tmp_path: Path, batches: Tensor) -> None:
    model = get_peft_model(build("qwen3", torch.bfloat16), S2FTConfig(ratios=RATIOS, init_weights=False))

    def in_each() -> dict[str, Tensor]:
        sharded = shard(copy.deepcopy(model))
        fit(sharded, mine(batches), steps=0)
        sharded(input_ids=mine(batches)[0], labels=mine(batches)[0]).loss.backward()
        return {name: p.grad.full_tensor() for name, p in sharded.named_parameters() if p.requires_grad}

    gradients, _ = in_two(tmp_path, in_each)
    model(input_ids=batches[0], labels=batches[0]).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < 0.02 * expected[name].norm()  # of batches of another size in bf16


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_merges_switches_and_restores(tmp_path: Path, family: str) -> None:
    ratios = RATIOS if family == "llama" else 0.3  # GPT-2's weights lie the other way round
    model = get_peft_model(build(family, torch.float32), S2FTConfig(ratios=ratios, init_weights=False))
    model.add_adapter("other", S2FTConfig(ratios=ratios, init_weights=False, seed=1))
    ids = torch.randint(3, VOCABULARY, (2, 7))

    def in_each() -> list[dict[str, Tensor]]:
        sharded = copy.deepcopy(model).eval()
        units = sharded.get_base_model()
        for block in units.model.layers if family == "llama" else units.transformer.h:
            fully_shard(block, reshard_after_forward=False)
        fully_shard(sharded)
        before, states = whole(sharded), []
        plain = logits(sharded, ids)  # leaves the units whole
        sharded.merge_adapter(["default", "other"])
        states.append(whole(sharded))
        sharded.unmerge_adapter()
        assert same(whole(sharded), before)
        s2ft.switch(sharded, "other")
        states.append(whole(sharded))
        s2ft.switch(sharded, None)
        assert same(whole(sharded), before)
        sharded.set_adapter("default")
        assert torch.equal(logits(sharded, ids), plain)
        return [*states, whole(sharded.merge_and_unload())]

    for found in in_two(tmp_path, in_each):
        model.merge_adapter(["default", "other"])
        assert same(found[0], model.state_dict())
        model.unmerge_adapter()
        s2ft.switch(model, "other")
        assert same(found[1], model.state_dict())
        s2ft.switch(model, None)
        model.set_adapter("default")
        assert same(found[2], copy.deepcopy(model).merge_and_unload().state_dict())


def test_the_first_process_chooses_with_a_seed_that_all_have_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first has weights: accelerate's `cpu_ram_efficient_loading`."""
    base = build("llama", torch.float32)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")

    def in_each() -> tuple[Any, int | None]:
        torch.manual_seed(distributed.get_rank())
        config = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=RATIOS)).peft_config["default"]
        return config.slices, config.seed

    found = in_two(tmp_path, in_each)
    assert (
        found[0] == found[1] == (select(base, S2FTConfig(ratios=RATIOS, seed=found[0][1])).config.slices, found[0][1])
    )


def test_channels_are_chosen_and_adapters_loaded_on_a_sharded_base(tmp_path: Path) -> None:
    base, ids = build("llama", torch.float32), torch.randint(3, VOCABULARY, (2, 7))
    config = S2FTConfig(ratios=RATIOS, strategy="weight")
    saved = get_peft_model(copy.deepcopy(base), replace(config, init_weights=False))
    saved.save_pretrained(tmp_path / "adapter")

    def in_each() -> tuple[Any, Tensor, dict[str, Tensor]]:
        sharded = shard(copy.deepcopy(base))
        chosen = select(sharded, config).config.slices
        loaded = PeftModel.from_pretrained(sharded, tmp_path / "adapter").eval()
        started = shard(get_peft_model(copy.deepcopy(base), config))
        started.load_adapter(tmp_path / "adapter", "default")  # into deltas that are sharded, as when a run goes on
        return chosen, logits(loaded, ids), whole(started)

    for slices, found, state in in_two(tmp_path, in_each):
        assert slices == select(base, config).config.slices
        torch.testing.assert_close(found, logits(saved.eval(), ids))
        assert same(state, saved.state_dict())


def test_an_adapter_of_another_base_is_refused_in_every_process(tmp_path: Path) -> None:
    get_peft_model(build("llama", torch.float32), S2FTConfig(ratios=RATIOS)).save_pretrained(tmp_path / "adapter")
    other = build("llama", torch.float32)

    def in_each() -> str:
        sharded = shard(other)
        with pytest.raises(s2ft.S2FTError, match="made for another base"):
            PeftModel.from_pretrained(sharded, tmp_path / "adapter")
        return "refused"

    assert in_two(tmp_path, in_each) == ["refused", "refused"]
