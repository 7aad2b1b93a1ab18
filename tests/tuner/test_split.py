"""A model that transformers splits over two processes (tensor parallelism): it does what one process does."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.parallelism_config import ParallelismConfig
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.distributed import DistributedConfig

import s2ft
from families import TWO_BLOCKS, tokens
from live import layers, logits, same, state, unchanged
from mixtures import mixture
from s2ft import S2FTConfig, S2FTError, select
from s2ft.layer.sharding import gathered
from two_processes import in_two

pytestmark = pytest.mark.usefixtures("one_thread")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPLITS_ODD_SIZES = Version(transformers.__version__) >= Version("5.23")
SPLIT_SIZES = (
    {"vocab_size": 61, "intermediate_size": 45} if SPLITS_ODD_SIZES else {"vocab_size": 62, "intermediate_size": 46}
)
RATIOS = dict.fromkeys(PROJECTIONS, 0.5) | {"up_proj": 0.2, "gate_proj": 0.2, "down_proj": 0.3}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Grouped queries, biases, an odd number of channels; in block 0 the first process has all channels with large weights."""
    sizes = {**TWO_BLOCKS, **SPLIT_SIZES, "num_key_value_heads": 2, "head_dim": 10}
    model = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        mlp = model.model.layers[0].mlp
        mlp.down_proj.weight[:, 23:] *= 0.1
        mlp.up_proj.weight[23:] *= 0.1
        mlp.gate_proj.weight[23:] *= 0.1
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options)
    return model.eval()


def split(folder: Path, **settings: Any) -> PreTrainedModel:
    return load(folder, distributed_config=DistributedConfig(tp_size=2, **settings))


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: gathered(value).clone() for name, value in model.state_dict().items()}


def fit(model: nn.Module, batches: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The losses, and the gradients of the first step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses, gradients = [], []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        gradients = gradients or [p.grad.clone() for p in trained]
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


@pytest.mark.parametrize("steps", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_it_trains_saves_and_generates_what_one_process_does(tmp_path: Path, base: Path, steps: int) -> None:
    config, batches, ids = S2FTConfig(ratios=RATIOS, strategy="weight"), tokens(steps, 4, 7), tokens(2, 5)

    def in_each() -> tuple[Any, ...]:
        model = get_peft_model(split(base), config)
        fitted = fit(model, batches)
        model.save_pretrained(tmp_path / "ours", is_main_process=distributed.get_rank() == 0)
        distributed.barrier()
        loaded = PeftModel.from_pretrained(split(base), tmp_path / "ours").eval()
        generated = loaded.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        return *fitted, model.peft_config["default"].slices, logits(loaded, ids), generated

    answers = in_two(tmp_path, in_each, patience=60 + 10 * steps)
    model = get_peft_model(load(base), config)
    losses, gradients = fit(model, batches)
    model.save_pretrained(tmp_path / "theirs")
    generated = model.eval().generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    for ours in answers:
        torch.testing.assert_close(ours[0], losses)
        for gradient, expected in zip(ours[1], gradients, strict=True):
            assert (gradient - expected).norm() < 1e-10 * expected.norm()
        assert ours[2] == model.peft_config["default"].slices
        torch.testing.assert_close(ours[3], logits(model, ids), rtol=1e-5, atol=1e-5)  # saved in fp32
        assert torch.equal(ours[4], generated)
    assert all(map(torch.equal, answers[0][1], answers[1][1]))  # so the processes do not part
    assert max(layers(model)[6].block("default").indices) < 23  # the second process has none of them
    saved, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (saved[name] - tensor).double().norm() <= 1e-6 * tensor.double().norm(), name


def test_it_merges_switches_and_restores(tmp_path: Path, base: Path) -> None:
    config, ids = S2FTConfig(ratios=RATIOS, strategy="weight", init_weights=False), tokens(2, 7)
    get_peft_model(load(base), config).save_pretrained(tmp_path / "adapter")

    def in_each() -> tuple[Any, ...]:
        model = PeftModel.from_pretrained(split(base), tmp_path / "adapter").eval()
        model.add_adapter("random", config)
        before, plain = whole(model), logits(model, ids)
        model.merge_adapter()
        merged = logits(model, ids)
        model.unmerge_adapter()
        s2ft.switch(model, "default")
        switched = logits(model, ids)
        s2ft.switch(model, None)
        assert same(whole(model), before)
        model.set_adapter("default")
        with s2ft.in_place(model) as layout:
            assert {place.how for place in layout.placements} == {"added"}
            torch.testing.assert_close(logits(model, ids), plain, rtol=1e-5, atol=1e-5)  # norms go through float32
        with pytest.raises(S2FTError, match="a mixed batch is not computed where tensor parallelism splits"):
            logits(model, ids, adapter_names=["default", "random"])
        blocks = [layer.block("random").weight.detach().clone() for layer in layers(model)]
        return plain, merged, switched, blocks, whole(model.merge_and_unload())

    first, second = in_two(tmp_path, in_each)
    model = PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()
    for found in (*first[:3], *second[:3]):
        torch.testing.assert_close(found, logits(model, ids))
    assert all(map(torch.equal, first[3], second[3]))  # random deltas are the same in all processes
    assert same(first[4], copy.deepcopy(model).merge_and_unload().state_dict())


def test_what_cannot_be_computed_is_refused_and_nothing_has_changed(tmp_path: Path, base: Path) -> None:
    mixture("mixtral").save_pretrained(tmp_path / "experts")
    other_side = {f"model.layers.{block}.self_attn.o_proj": "out 1-3" for block in range(2)}

    def in_each() -> str:
        model, experts = split(base), split(tmp_path / "experts")
        before = {name: dict(state(which)) for name, which in (("model", model), ("experts", experts))}
        for config, message in (
            (
                S2FTConfig(target_modules=list(other_side), slices=other_side),
                "is split on the other side than the slice",
            ),
            (S2FTConfig(ratios={"o_proj": 0.5}, strategy="activation"), "tensor parallel.: choose channels before"),
        ):
            with pytest.raises(S2FTError, match=message):
                select(model, config, [tokens(1, 3)]) if config.slices is None else get_peft_model(model, config)
        with pytest.raises(S2FTError, match="is a stack of experts, in a model that tensor parallelism splits over 2"):
            get_peft_model(experts, S2FTConfig(ratios={"down_proj": 0.5}, strategy="random"))
        assert unchanged(before["model"], model)
        assert unchanged(before["experts"], experts)
        return "refused"

    assert in_two(tmp_path, in_each) == ["refused", "refused"]


def test_experts_of_which_each_process_has_some_are_refused(tmp_path: Path) -> None:
    mixture("mixtral").save_pretrained(tmp_path / "experts")

    def in_each() -> str:
        by = {"ep_size": 2} if hasattr(DistributedConfig, "ep_size") else {"enable_expert_parallel": True}
        model = split(tmp_path / "experts", **by)
        before = dict(state(model))
        with pytest.raises(
            S2FTError, match=r"expert parallel|a stack of experts, in a model that tensor parallelism splits"
        ):
            get_peft_model(model, S2FTConfig(ratios={"down_proj": 0.5}))
        assert unchanged(before, model)
        return "refused"

    assert in_two(tmp_path, in_each) == ["refused", "refused"]


@pytest.mark.slow
def test_trainer_trains_what_one_process_does(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate takes tensor parallelism on accelerators only; without its check, the CPU does as well."""
    monkeypatch.setattr(ParallelismConfig, "_validate_accelerator", lambda *_: None)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(32, 7)]
    settings: dict[str, Any] = {
        "max_steps": 8,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
    }
    settings |= {"save_strategy": "no", "report_to": [], "optim": "adamw_torch", "disable_tqdm": True}

    def trained(model: PreTrainedModel) -> list[Tensor]:
        tuned = get_peft_model(model, S2FTConfig(ratios=RATIOS, strategy="weight"))
        arguments = TrainingArguments(str(tmp_path / "run"), **settings)
        Trainer(tuned, arguments, train_dataset=rows, data_collator=default_data_collator).train()
        return [layer.block("default").weight.detach() for layer in layers(tuned)]

    def in_each() -> list[Tensor]:
        rank = str(distributed.get_rank())
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "ACCELERATE_USE_CPU": "true"}
        return trained(split(base))

    first, second = in_two(tmp_path, in_each, patience=180)
    assert all(map(torch.equal, first, second))
    for ours, theirs in zip(first, trained(load(base)), strict=True):
        assert (ours - theirs).norm() < 1e-8 * theirs.norm()
