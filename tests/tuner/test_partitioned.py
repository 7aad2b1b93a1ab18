"""A model that DeepSpeed ZeRO-3 partitions over two processes (`make test-distributed` installs DeepSpeed)."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, distributed

import s2ft
from families import VOCABULARY, build
from live import layers
from s2ft import S2FTConfig, select
from s2ft.layer.sharding import gathered
from two_processes import in_two

pytestmark = pytest.mark.usefixtures("one_thread")
RATIOS = {"q_proj": 0.5, "o_proj": 0.5, "up_proj": 0.2, "down_proj": 0.3}


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return pytest.importorskip("deepspeed")


def engine_of(model: torch.nn.Module, deepspeed: Any, stage: int = 3) -> Any:
    os.environ |= {"RANK": str(distributed.get_rank()), "LOCAL_RANK": str(distributed.get_rank()), "WORLD_SIZE": "2"}
    deepspeed.init_distributed("gloo", dist_init_required=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}
    settings |= {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_trains_saves_merges_and_restores_as_one_process_does(tmp_path: Path, deepspeed: Any, stage: int) -> None:
    base = build("llama", torch.float32)
    model = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=RATIOS, init_weights=False))
    batches = torch.randint(3, VOCABULARY, (20, 4, 7))

    def in_each() -> tuple[list[Tensor], list[Tensor]]:
        divided = copy.deepcopy(model)
        engine = engine_of(divided, deepspeed, stage)
        for ids in batches.chunk(2, dim=1)[distributed.get_rank()]:
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        divided.save_pretrained(tmp_path / "adapter", is_main_process=distributed.get_rank() == 0)

        def bases() -> list[Tensor]:
            return [gathered(layer.weight).clone() for layer in layers(divided)]

        before = bases()
        divided.eval().merge_adapter()
        merged = bases()
        divided.unmerge_adapter()
        assert all(map(torch.equal, bases(), before))
        s2ft.switch(divided, "default")
        assert all(map(torch.equal, bases(), merged))
        s2ft.switch(divided, None)
        assert all(map(torch.equal, bases(), before))
        return merged, before

    for merged, before in in_two(tmp_path, in_each, patience=180):
        saved = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
        assert all(torch.equal(layer.weight, own) for layer, own in zip(layers(saved), before, strict=True))
        saved.merge_adapter()
        assert all(torch.equal(layer.weight, own) for layer, own in zip(layers(saved), merged, strict=True))
        saved.unmerge_adapter()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for ids in batches:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(layers(saved), layers(model), strict=True):
        expected = theirs.block("default").weight
        assert (ours.block("default").weight - expected).norm() < 1e-5 * expected.norm()


def test_channels_are_chosen_one_layer_at_a_time(tmp_path: Path, deepspeed: Any) -> None:
    base = build("llama", torch.float32)
    expected = select(base, S2FTConfig(ratios=RATIOS, strategy="weight")).config.slices

    def in_each() -> Any:
        model = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=RATIOS, strategy="weight"))
        engine_of(model, deepspeed)
        return select(model, S2FTConfig(ratios=RATIOS, strategy="weight")).config.slices

    assert in_two(tmp_path, in_each, patience=180) == [expected, expected]
