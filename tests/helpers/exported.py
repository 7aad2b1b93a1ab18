"""A base on disk and an adapter for it, for the tests of exports: every family, projections on both sides."""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import build
from s2ft import S2FTConfig

SIDES = {
    "input": {"o_proj": 0.5, "down_proj": 0.2},
    "output": {"q_proj": 0.5, "v_proj": 1.0, "up_proj": 0.3},
    "both": {"q_proj": 0.5, "k_proj": 1.0, "o_proj": 0.5, "up_proj": 0.2, "down_proj": 0.1},
}


def save_base(folder: Path, family: str, dtype: torch.dtype = torch.float32, **how: object) -> Path:
    """A fresh random model of the family."""
    build(family, dtype).save_pretrained(folder, **how)
    return folder


def load_base(folder: Path) -> PreTrainedModel:
    """In the dtype of its files."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def save_adapter(folder: Path, base: Path, ratios: object, size: float = 0.3, **config: object) -> Path:
    """Random deltas, large enough to change what the model says."""
    model = get_peft_model(load_base(base), S2FTConfig(ratios=ratios, task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".s2ft_block." in name or "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(size * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def load(base: Path, adapter: Path) -> PreTrainedModel:
    """The base with an adapter of any method."""
    return PeftModel.from_pretrained(load_base(base), adapter).eval()
