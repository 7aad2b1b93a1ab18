"""Tiny mixtures of experts, one for each way in which transformers stacks experts."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 62,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: hf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=20, num_experts=5, num_experts_per_tok=3, mlp_only_layers=[1]
    ),
    "gpt-oss": lambda: hf.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),  # transposed, interleaved
    "llama4": lambda: hf.Llama4TextConfig(  # transposed, tokens sorted by expert; and a shared expert
        **SIZES, intermediate_size_mlp=40, num_local_experts=3, num_experts_per_tok=1, pad_token_id=0
    ),
    "nemotron-h": lambda: hf.NemotronHConfig(  # without gates
        **{**SIZES, "num_hidden_layers": 2},
        layers_block_type=["attention", "moe"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=16,
    ),
}


def mixture(family: str, dtype: torch.dtype = torch.float64, implementation: str = "eager") -> PreTrainedModel:
    """A random model, frozen; grouped products have no float64."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[family]()).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    if family != "llama4":
        model.set_experts_implementation(implementation)
    return model.requires_grad_(False)


def text(rows: int = 2, length: int = 7) -> torch.Tensor:
    """Random tokens."""
    return torch.randint(3, SIZES["vocab_size"], (rows, length))
