"""LoRA and DoRA: PEFT's config, the layers it lies on, and the rank that trains a given number of parameters.

W + (alpha / rank) · B A        A [rank, in], B [out, rank]; DoRA rescales each row to a trained magnitude
"""

from __future__ import annotations

import re

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedModel

from s2ft.common.errors import S2FTError, first_line
from s2ft.format.names import name_in_layer
from s2ft.layer.linears import features, linear_layer
from s2ft.selection.structure import read_structures

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # the S²FT paper's, with its dropout
LORA_DROPOUT = 0.05


def lora_config(
    rank: int, alpha: int, dropout: float = 0.0, targets: str | list[str] = "all-linear", dora: bool = False
) -> LoraConfig:
    """PEFT's config of a LoRA or DoRA for a causal language model."""
    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM"
    )


def lora_targets(model: nn.Module) -> str | list[str]:
    """The names of the modules that hold q, k, v, up and down; all linear layers where the model cannot be read.

    Fused projections are adapted whole.
    """
    structures = read_structures(model).structures
    if any(structure.partial for structure in structures if structure.kind == "attention"):
        return "all-linear"
    paths = [p.module for structure in structures for p in structure.projections if p.name in LORA_TARGETS]
    names = dict.fromkeys(name_in_layer(path) for path in paths)  # mlp.c_proj is not attn.c_proj
    return list(names) or "all-linear"


def check_targets(config: LoraConfig, model: nn.Module) -> None:
    """Raises `S2FTError` where PEFT would stop half-way through the model."""
    given = config.target_modules
    if given == "all-linear":
        return
    try:
        matched = [(path, m) for path, m in model.named_modules() if check_target_module_exists(config, path)]
    except re.error as error:
        raise S2FTError(f"target_modules={given!r} is no regular expression: {first_line(error)}") from None
    if not matched:
        names = {path.rpartition(".")[2] for path, module in model.named_modules() if linear_layer(module) is not None}
        raise S2FTError(f"target_modules={_listed(given)} match none of the linear layers {', '.join(sorted(names))}")
    for path, module in matched:
        if linear_layer(module) is None:
            raise S2FTError(
                f"target_modules={_listed(given)} matches {path}, a {type(module).__name__}; name linear layers"
            )


def check_head(config: PeftConfig, model: PreTrainedModel) -> None:
    """Raises `S2FTError` where an adapter would lie on the output layer, whose weight TRL's loss reads past it."""
    head = model.get_output_embeddings()
    path = next((path for path, module in model.named_modules() if module is head), None)
    if path is None or getattr(config, "target_modules", None) is None:
        return
    sliced = getattr(config, "slices", None)
    if path in sliced if sliced is not None else check_target_module_exists(config, path):
        raise S2FTError(
            f"target_modules={_listed(config.target_modules)} matches {path}, the output layer: training computes the loss "
            "from its weight directly, so an adapter there would never be trained; leave it out"
        )


def _listed(given: str | list[str] | set[str] | None) -> str:
    return repr(sorted(given) if isinstance(given, set) else given)


def equal_rank(model: nn.Module, parameters: int, dora: bool = False, targets: str | list[str] = "all-linear") -> int:
    """The rank (at least 1) of the LoRA on these layers whose number of parameters is nearest to `parameters`.

    Raises:
        S2FTError: if the targets are no linear layers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
        >>> equal_rank(LlamaForCausalLM(config), 4 * (4 * (16 + 16) + 3 * (16 + 24)))
        4
    """
    config = lora_config(1, 1, targets=targets)
    check_targets(config, model)
    meant = {
        path: linear
        for path, linear in linears(model).items()
        if targets == "all-linear" or check_target_module_exists(config, path)
    }
    sizes = [features(linear) for linear in meant.values()]
    magnitudes = sum(out for _, out in sizes) if dora else 0
    return max(1, round((parameters - magnitudes) / sum(into + out for into, out in sizes)))


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's "all-linear": every linear layer but the head, by its path."""
    head = _head(model) if isinstance(model, PreTrainedModel) else None
    paths = [path for path, module in model.named_modules() if linear_layer(module) is module and module is not head]
    return {path: model.get_submodule(path) for path in paths}


def _head(model: PreTrainedModel) -> nn.Module | None:
    """The output layer, of a classifier by the names that PEFT looks for."""
    named = (getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES)
    return model.get_output_embeddings() or next((module for module in named if module is not None), None)
