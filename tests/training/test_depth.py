"""Backward stops at the lowest trained block, with every kind of checkpointing, and only there are blocks checkpointed."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import build, tokens
from live import checkpoint
from s2ft import S2FTConfig
from s2ft.selection.select import select
from s2ft.training.depth import lowest_trained, stop_below


def adapted(**options: Any) -> PeftModel:
    config = S2FTConfig(
        **{"ratios": {"o_proj": 0.5, "down_proj": 0.1}, "layers": "last:1", "init_weights": False, "seed": 3, **options}
    )
    return get_peft_model(build("mistral", torch.float32), config).train()


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


class Passes:
    """Counts forward and backward passes through each block's MLP."""

    def __init__(self, model: PeftModel) -> None:
        self.blocks = model.get_base_model().model.layers
        self.forward, self.backward = [0] * len(self.blocks), [0] * len(self.blocks)
        for index, block in enumerate(self.blocks):
            block.mlp.register_forward_pre_hook(lambda *_, index=index: self._add(self.forward, index))
            block.mlp.register_forward_hook(lambda *given, index=index: self._watch(given[2], index))

    def _watch(self, output: Tensor, index: int) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: self._add(self.backward, index))

    @staticmethod
    def _add(counts: list[int], index: int) -> None:
        counts[index] += 1


def plain(model: PeftModel) -> None:
    """Nothing is checkpointed."""


def by_trainer(reentrant: bool) -> Any:
    def enable(model: PeftModel) -> None:
        checkpoint(model, use_reentrant=reentrant)

    return enable


def by_the_older_name(model: PeftModel) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def by_torchs_own_choice(model: PeftModel) -> None:
    """Options that do not say whether it is reentrant: to torch, it is."""
    checkpoint(model, preserve_rng_state=False)


def as_trl_does(model: PeftModel) -> None:
    model.enable_input_require_grads()
    checkpoint(model)
    model.enable_input_require_grads()


def on_the_base_then_train(model: PeftModel) -> None:
    checkpoint(model.get_base_model())
    model.train()


WAYS = {
    "plain": plain,
    "checkpoints": by_trainer(False),
    "reentrant": by_trainer(True),
    "older name": by_the_older_name,
    "torch's choice": by_torchs_own_choice,
    "trl": as_trl_does,
    "base": on_the_base_then_train,
}


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
@pytest.mark.parametrize("way", WAYS)
def test_blocks_below_run_once_and_never_backwards(way: str) -> None:
    model, ids = adapted(), tokens(2, 7)
    expected = gradients(model, ids)
    passes = Passes(model)
    WAYS[way](model)
    ours = gradients(model, ids)
    recomputed = 1 if way == "plain" else 2
    assert passes.forward == [1, 1, recomputed]
    assert passes.backward[:2] == [0, 0]
    assert passes.backward[2] >= 1
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient)


def test_a_model_that_was_checkpointed_before_is_confined_too() -> None:
    base = build("mistral", torch.float32)
    checkpoint(base)
    model = get_peft_model(base, S2FTConfig(ratios=0.2, layers=[1, 2])).train()
    passes = Passes(model)
    gradients(model, tokens(2, 7))
    assert passes.forward == [1, 2, 2]
    assert passes.backward[0] == 0


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
@pytest.mark.parametrize("way", WAYS)
def test_blocks_that_another_adapter_trains_get_their_gradients(way: str) -> None:
    model, ids = adapted(), tokens(2, 7)
    model.add_adapter("whole", S2FTConfig(ratios=0.2, init_weights=False, seed=4))
    model.set_adapter("whole")
    expected = gradients(model, ids)
    model.set_adapter("default")
    alone = gradients(model, ids)
    WAYS[way](model)
    passes = Passes(model)
    for name, wanted in (("default", alone), ("whole", expected), ("default", alone), ("whole", expected)):
        model.set_adapter(name)
        ours = gradients(model.train(), ids)
        assert ours.keys() == wanted.keys()
        for parameter, gradient in wanted.items():
            torch.testing.assert_close(ours[parameter], gradient)
        assert (passes.backward[0] > 0) == (name == "whole")
        passes.backward[:] = [0, 0, 0]


@pytest.mark.parametrize("end", ["unload", "merge_and_unload"])
def test_a_base_that_comes_back_is_checkpointed_as_before(end: str) -> None:
    base = build("mistral", torch.float32)
    base.enable_input_require_grads()
    checkpoint(base, use_reentrant=True)
    hooked = {name for name, module in base.named_modules() if module._forward_hooks}
    model = get_peft_model(base, S2FTConfig(ratios=0.2, layers="last:1")).train()
    gradients(model, tokens(2, 7))
    back = getattr(model, end)()
    assert all(block.gradient_checkpointing for block in back.model.layers)
    assert {name for name, module in back.named_modules() if module._forward_hooks} == hooked


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
@pytest.mark.parametrize("end", ["unload", "another adapter"])
def test_what_is_turned_off_stays_off_whatever_trains_later(end: str) -> None:
    model = adapted()
    model.add_adapter("whole", S2FTConfig(ratios=0.2, init_weights=False, seed=4))
    model.enable_input_require_grads()
    checkpoint(model, use_reentrant=True)
    base = model.get_base_model()
    base.gradient_checkpointing_disable()
    if end == "unload":
        base = model.unload()
    else:
        model.set_adapter("whole")
        passes = Passes(model)
        gradients(model.train(), tokens(2, 7))
        assert passes.forward == [1, 1, 1]
    assert not any(block.gradient_checkpointing for block in base.model.layers)
    assert not base.get_input_embeddings()._forward_hooks


def test_all_blocks_are_checkpointed_where_all_train() -> None:
    model = adapted(layers=None)
    checkpoint(model)
    passes = Passes(model)
    gradients(model, tokens(2, 7))
    assert passes.forward == [2, 2, 2]


def test_what_trains_below_the_blocks_keeps_its_gradient() -> None:
    model = adapted(trainable_token_indices={"embed_tokens": [5, 6]})
    checkpoint(model)
    assert stop_below(model) is None
    trained = gradients(model, torch.tensor([[5, 6, 7, 5]]))
    embedding = next(gradient for name, gradient in trained.items() if "trainable_tokens" in name)
    assert embedding.abs().sum() > 0


def test_inputs_that_the_user_asks_gradients_of_get_them() -> None:
    model = adapted()
    checkpoint(model)
    x = torch.randn(2, 5, 24, requires_grad=True)
    model(inputs_embeds=x).logits.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def blocks_of(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    return [(f"model.layers.{index}", block) for index, block in enumerate(model.model.layers)]


def test_lowest_trained_block() -> None:
    model = build("llama", torch.float32).requires_grad_(False)
    assert lowest_trained(model, blocks_of(model)) is None
    model.model.layers[2].mlp.down_proj.weight.requires_grad_()
    model.model.layers[1].self_attn.o_proj.weight.requires_grad_()
    assert lowest_trained(model, blocks_of(model)) == 1
    model.model.norm.weight.requires_grad_()  # it may lie below, for all that names tell
    assert lowest_trained(model, blocks_of(model)) is None


def test_selecting_with_layers_counts_from_the_end() -> None:
    config = select(build("mistral"), S2FTConfig(ratios=0.2, layers="last:50%", seed=1)).config
    assert {path.split(".")[2] for path in config.slices or {}} == {"1", "2"}
