"""What the tests of a GPU share: the device, adapted models on it, and their reference in float64 on the CPU.

`S2FT_GPU_TESTS_DEVICE=cpu` runs the same tests without a GPU, to test the tests.
"""

import copy
import os
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from families import build, tokens
from s2ft import S2FTConfig
from s2ft.layer.linear import S2FTLinear
from s2ft.layer.linears import weight_matrix

DEVICE = torch.device(os.environ.get("S2FT_GPU_TESTS_DEVICE", "cuda"))
IS_CUDA = DEVICE.type == "cuda"

EVERYWHERE = {"q_proj": 0.5, "k_proj": 0.5, "v_proj": 0.5, "o_proj": 0.25, "up_proj": 0.2, "down_proj": 0.1}


def adapted(family: str, dtype: torch.dtype, adapters: int = 1, **options: Any) -> PeftModel:
    """A model on the device with random adapters "default", "a1", "a2", ..., which overlap; the first is active."""
    config = {"ratios": EVERYWHERE, "init_weights": False, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(build(family, dtype).to(DEVICE), S2FTConfig(**config, seed=0))
    for number in range(1, adapters):
        model.add_adapter(f"a{number}", S2FTConfig(**config, seed=number))
    for layer in sliced(model).values():
        for block in layer.s2ft_block.values():
            nn.init.normal_(block.weight, std=0.15)  # a forgotten one changes the output far beyond bf16's rounding
    return model


def random_tokens(*shape: int) -> Tensor:
    """Random token ids on the device."""
    return tokens(*shape).to(DEVICE)


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that a model's state dict holds beside its adapters."""
    return {name: value.clone() for name, value in model.state_dict().items() if ".s2ft_block." not in name}


def sliced(model: PeftModel) -> dict[str, S2FTLinear]:
    """Path in the base model → layer."""
    named = model.get_base_model().named_modules()
    return {path: layer for path, layer in named if isinstance(layer, S2FTLinear)}


def dense(model: PeftModel, adapter: str = "default") -> Any:
    """The reference: a plain model on the CPU in float64 that holds W + ΔW, all of it trained."""
    twin = copy.deepcopy(model).cpu().double()
    base = twin.get_base_model()
    for path, layer in sliced(twin).items():
        if adapter in layer.s2ft_block:
            block = layer.block(adapter)
            weight_matrix(layer.base_layer).data.index_add_(block.dim, block.indices, block.weight.data)
        base.set_submodule(path, layer.base_layer)
    return base.requires_grad_(True).eval()


def slice_gradients(model: PeftModel, ids: Tensor) -> dict[str, Tensor]:
    """What backward gives each delta; on the CPU in float64."""
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {path: layer.block("default").weight.grad.cpu().double() for path, layer in sliced(model).items()}


def dense_gradients(plain: Any, model: PeftModel, ids: Tensor) -> dict[str, Tensor]:
    """What full autograd of a plain model gives the same slices."""
    plain.zero_grad()
    ids = ids.to(plain.device)
    plain(input_ids=ids, labels=ids).loss.backward()
    found = {}
    for path, layer in sliced(model).items():
        block, linear = layer.block("default"), plain.get_submodule(path)
        gradient = linear.weight.grad.T if isinstance(linear, Conv1D) else linear.weight.grad
        found[path] = gradient.cpu().double().index_select(block.dim, block.indices.cpu())
    return found


def distance(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The norm of all differences together, relative to that of what is expected."""
    assert ours.keys() == expected.keys()
    wrong = sum(float((ours[name].cpu().double() - expected[name].cpu().double()).square().sum()) for name in ours)
    size = sum(float(value.double().square().sum()) for value in expected.values())
    assert size > 0
    return float((wrong / size) ** 0.5)


def error(ours: Tensor, expected: Tensor) -> float:
    """The same for two tensors."""
    return distance({"": ours.detach()}, {"": expected.detach()})
