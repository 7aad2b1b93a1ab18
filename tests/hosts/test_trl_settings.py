"""S²FT under settings of TRL's SFTTrainer, in both layouts: a step moves the slices as full training moves their channels."""

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from s2ft import S2FTConfig, in_place
from s2ft.layer.linear import sliced_layers
from tiny_base import byte_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS: dict[str, Callable[[Any], Any]] = {"indexed": lambda model: nullcontext(), "in place": in_place}
MARKED = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)  # marks what the assistant says
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packing": {"packing": True, "packing_strategy": "bfd", "max_length": 64},
    "wrapped packing": {"packing": True, "packing_strategy": "wrapped", "max_length": 32},
    "assistant-only loss": {"assistant_only_loss": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "compiled and checkpointed": {
        "torch_compile": True,
        "torch_compile_backend": "aot_eager",
        "gradient_checkpointing": True,
    },
    "compiled by inductor": {"torch_compile": True, "torch_compile_backend": "inductor"},
    "activation offloading": {"activation_offloading": True},
    "liger": {"use_liger_kernel": True},
}
SLOW = {"compiled", "compiled and checkpointed", "compiled by inductor"}
RATE = 0.5


def rows(setting: str) -> Dataset:
    texts = [(f"{n}{n + 1}", f"abc{n} de") for n in range(4)]
    if setting != "assistant-only loss":
        return Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in texts])
    roles = ("user", "assistant", "user", "assistant")
    talks = [
        [{"role": role, "content": text} for role, text in zip(roles, (*pair, *pair[::-1]), strict=True)]
        for pair in texts
    ]
    return Dataset.from_list([{"messages": talk} for talk in talks])


def trained(model: LlamaForCausalLM, setting: str, layout: str, folder: Path, **more: Any) -> Any:
    """The model after one step of SGD."""
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": RATE,
        "max_grad_norm": 0,
    }
    settings |= {"lr_scheduler_type": "constant", "report_to": [], "bf16": False, "save_strategy": "no"}
    settings |= {"gradient_checkpointing": False, "disable_tqdm": True, "use_cpu": not torch.cuda.is_available()}
    trainer = SFTTrainer(
        model,
        SFTConfig(str(folder), **{**settings, **SETTINGS[setting]}),
        train_dataset=rows(setting),
        processing_class=byte_tokenizer(MARKED if setting == "assistant-only loss" else None),
        **more,
    )
    with LAYOUTS[layout](trainer.model) as entered:
        assert entered is None or {place.how for place in entered.placements} == {"contiguous"}
        trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)


@pytest.fixture(scope="module")
def moves(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Tensor]]:
    """How a step of full training, without compilation, offloading or Liger, moves the weights on a setting's data."""
    found: dict[str, dict[str, Tensor]] = {}

    def of(setting: str) -> dict[str, Tensor]:
        data = setting if setting in ("packing", "wrapped packing", "assistant-only loss") else "plain"
        if data not in found:
            before = {name: tensor.clone() for name, tensor in tiny_model().state_dict().items()}
            after = trained(tiny_model(), data, "indexed", tmp_path_factory.mktemp("full")).cpu().state_dict()
            found[data] = {name: after[name] - before[name] for name in before}
        return found[data]

    return of


def skip_where_it_cannot_run(setting: str) -> None:
    if setting == "activation offloading" and not torch.cuda.is_available():
        pytest.skip("TRL offloads from an accelerator")
    if setting == "liger" and (find_spec("liger_kernel") is None or not torch.cuda.is_available()):
        pytest.skip("liger-kernel and a GPU are wanted")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "setting",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SETTINGS],
)
def test_a_step_moves_the_slices_as_full_training_does(
    setting: str, layout: str, moves: Callable[[str], dict[str, Tensor]], tmp_path: Path
) -> None:
    skip_where_it_cannot_run(setting)
    torch.compiler.reset()
    config = S2FTConfig(ratios=0.25, strategy="weight", task_type="CAUSAL_LM")
    model = trained(tiny_model(), setting, layout, tmp_path, peft_config=config)
    layers = sliced_layers(model, "default")
    assert layers
    for path, layer in layers.items():
        block = layer.block("default")
        full = moves(setting)[path.removeprefix("base_model.model.") + ".weight"]
        expected = full.index_select(block.dim, block.indices.cpu())
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(block.weight.detach().cpu(), expected, rtol=2e-3, atol=2e-6)
    after = model.unload().cpu().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in tiny_model().state_dict().items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_that_are_saved_elsewhere_give_the_same_gradients(layout: str) -> None:
    """What activation offloading does to tensors that are saved for backward, on a machine without an accelerator."""
    from peft import get_peft_model

    model = get_peft_model(tiny_model(), S2FTConfig(ratios=0.25, init_weights=False, task_type="CAUSAL_LM"))
    ids = torch.randint(2, 258, (3, 9))

    def gradients(saving: Any) -> list[Tensor]:
        model.zero_grad()
        with saving:
            model(input_ids=ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    with LAYOUTS[layout](model):
        expected = gradients(nullcontext())
        for ours, theirs in zip(gradients(torch.autograd.graph.save_on_cpu()), expected, strict=True):
            assert torch.equal(ours, theirs)
