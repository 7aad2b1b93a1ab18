"""Tiny randomly initialised models, one for each family that s2ft is proven on; odd sizes, so that a swapped side
shows.
"""

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 61
_COMMON = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
_SIZES = {"hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4}
TWO_BLOCKS = {"vocab_size": VOCABULARY, **_SIZES, "num_hidden_layers": 2}


def _llama() -> PreTrainedModel:  # explicit head_dim, grouped-query attention, biases everywhere
    config = LlamaConfig(**_COMMON, **_SIZES, num_key_value_heads=2, head_dim=10, attention_bias=True, mlp_bias=True)
    return LlamaForCausalLM(config)


def _llama_multi_query() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_COMMON, **_SIZES, num_key_value_heads=1, tie_word_embeddings=True))


def _mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**_COMMON, **_SIZES, num_key_value_heads=2, sliding_window=5))


def _qwen2() -> PreTrainedModel:  # biases on q, k, v
    return Qwen2ForCausalLM(Qwen2Config(**_COMMON, **_SIZES, num_key_value_heads=2))


def _qwen3() -> PreTrainedModel:  # norms on q and k
    return Qwen3ForCausalLM(Qwen3Config(**_COMMON, **_SIZES, num_key_value_heads=2, head_dim=8))


def _gemma3() -> PreTrainedModel:  # norms on q and k, tied embeddings, sliding windows
    config = Gemma3TextConfig(**_COMMON, **_SIZES, num_key_value_heads=2, head_dim=8, sliding_window=5)
    return Gemma3ForCausalLM(config)


def _phi3() -> PreTrainedModel:  # fused qkv and gate_up
    return Phi3ForCausalLM(Phi3Config(**_COMMON, **_SIZES, num_key_value_heads=2))


def _gpt2() -> PreTrainedModel:  # Conv1D, fused qkv
    sizes = {"n_embd": 24, "n_inner": 44, "n_layer": 3, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
        )
    )


FAMILIES = {
    "llama": _llama,
    "llama-mqa": _llama_multi_query,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
}


def build(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A fresh model in evaluation mode; biases and norms are random too, so that a forgotten one shows."""
    model = FAMILIES[family]().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def hybrid() -> PreTrainedModel:
    """Convolutions and attention: its cache has more than keys and values."""
    sizes = {**_SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2}
    config = Lfm2Config(**_COMMON, **sizes, layer_types=["conv", "full_attention"], block_multiple_of=4)
    return Lfm2ForCausalLM(config).double().eval()


def tokens(*shape: int) -> torch.Tensor:
    """Random token ids without the special ones."""
    return torch.randint(3, VOCABULARY, shape)
