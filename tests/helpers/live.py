"""What many tests ask of a model: its output, its layers with slices, what it holds, and whether anything of it changed."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from s2ft import in_place
from s2ft.layer.linear import S2FTLinear


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, **options).logits
    return found


def layers(model: nn.Module) -> list[S2FTLinear]:
    return [module for module in model.modules() if isinstance(module, S2FTLinear)]


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that its state dict holds."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit for bit; names and dtypes included."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def state(model: nn.Module) -> dict[str, Any]:
    """All that a refusal must leave alone: structure, values, what is active, what trains."""
    peft_config = getattr(model, "peft_config", {})
    return {
        "modules": [(name, type(module).__name__) for name, module in model.named_modules()],
        "values": values(model),
        "trains": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "adapters": sorted(peft_config) if isinstance(peft_config, dict) else None,
        "loaded": getattr(model, "_hf_peft_config_loaded", None),
        "training": model.training,
    }


def unchanged(before: dict[str, Any], model: nn.Module) -> bool:
    """Since `state` was asked."""
    after = state(model)
    return same(before["values"], after["values"]) and all(
        before[key] == after[key] for key in before if key != "values"
    )


def checkpoint(model: Any, **options: Any) -> None:
    """Turns checkpointing on, by the newest name that this version of transformers has."""
    name = (
        "activation_checkpointing"
        if hasattr(PreTrainedModel, "activation_checkpointing_enable")
        else "gradient_checkpointing"
    )
    getattr(model, f"{name}_enable")(**({f"{name}_kwargs": options} if options else {}))


def losses_in_place(model: nn.Module, optimizer: Optimizer, ids: Tensor, steps: int = 30) -> list[float]:
    """Of each step on the same batch, in place."""
    losses = []
    with in_place(model):
        for _ in range(steps):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses
