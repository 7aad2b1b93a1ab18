"""Tiny random models of transformers' own classes, found in its tables of auto classes.

    a config's fields  →  small values, by their names (`SIZES`), in its parts too  →  the class, with random weights

Sizes are odd where they may be, so that swapped sides show; where a family wants others, it has a row in `OWN`.
"""

from __future__ import annotations

import dataclasses
import inspect
from copy import deepcopy
from functools import reduce
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from s2ft.common.errors import S2FTError
from s2ft.lab.families.own import ATTRIBUTES, FRAMES, HIDDEN, IMAGE, IMAGE_TOKEN, INPUTS, OWN, SECTIONS, VOCABULARY
from s2ft.training.dummy import dummy_inputs, main_input

MOST_PARAMETERS = 26_000_000  # of what counts as tiny

KINDS = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "encoder": "MASKED_LM",
    "vision": "IMAGE_CLASSIFICATION",
    "vision-language": "IMAGE_TEXT_TO_TEXT",
    "speech": "SPEECH_SEQ_2_SEQ",
}
"""Kind → which of transformers' tables lists its classes."""


def _all(value: int, *names: str) -> dict[str, int]:
    return dict.fromkeys(names, value)


SIZES: dict[str, int] = {
    **_all(HIDDEN, "hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "word_embed_proj_dim"),
    **_all(HIDDEN, "decoder_hidden_size", "encoder_hidden_size", "emb_dim", "projection_dim", "out_hidden_size"),
    **_all(HIDDEN, "output_dim", "model_dim", "input_dim", "lru_width", "width", "d_latents", "entity_emb_size"),
    **_all(8, "num_latents", "entity_vocab_size", "attention_window"),
    **_all(16, "pronunciation_vocab_size", "shape_vocab_size", "pronunciation_embed_dim", "shape_embed_dim"),
    **_all(48, "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim", "n_inner"),
    **_all(48, "ffn_hidden_size", "d_inner", "mlp_dim", "dense_ffn_hidden_size", "dff", "dim_ff"),
    **_all(20, "moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size"),
    **_all(20, "expert_ffn_hidden_size", "moe_ffn_dim", "prefix_dense_intermediate_size"),
    **_all(2, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"),
    **_all(2, "encoder_num_hidden_layers", "decoder_num_hidden_layers", "num_decoder_layers", "num_encoder_layers"),
    **_all(4, "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "attention_heads"),
    **_all(4, "decoder_attention_heads", "encoder_num_attention_heads", "decoder_num_attention_heads"),
    **_all(2, "num_key_value_heads", "num_kv_heads", "encoder_num_key_value_heads", "decoder_num_key_value_heads"),
    **_all(8, "head_dim", "d_kv", "d_head", "attention_head_dim", "dim_head", "global_head_dim", "index_head_dim"),
    **_all(VOCABULARY, "vocab_size", "vocab_size_per_layer_input"),
    **_all(128, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"),
    **_all(FRAMES // 2, "max_source_positions"),
    **_all(4, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"),
    **_all(2, "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "index_n_heads", "index_topk"),
    **_all(1, "n_group", "topk_group", "n_shared_experts", "num_shared_experts", "n_groups", "mamba_n_groups"),
    "kv_lora_rank": 14,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "rotary_dim": 4,
    "o_lora_rank": 8,
    "o_groups": 2,
    "image_size": IMAGE,
    "patch_size": 16,
    "num_channels": 3,
    **_all(4, "mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"),
    **_all(16, "mamba_d_head", "mamba_head_dim"),
    **_all(8, "mamba_d_state", "ssm_state_size", "state_size", "hidden_size_per_layer_input", "num_mel_bins"),
    **_all(2, "time_step_rank", "mamba_dt_rank", "linear_num_key_heads", "mamba_expand", "type_vocab_size"),
    **_all(6, "linear_key_head_dim", "linear_value_head_dim"),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
    "audio_token_id": 9,
    "image_token_index": IMAGE_TOKEN,
    "video_token_index": 6,
    "audio_token_index": 9,
}
"""Field of a config → its value."""

_LATENT = {"num_key_value_heads": 4, "head_dim": 4}  # head_dim: of the rotated part


def classes(kind: str) -> dict[str, str]:
    """model_type → the name of its class, as this version of transformers lists them.

    Example:
        >>> classes("causal")["llama"]
        'LlamaForCausalLM'
    """
    table = getattr(modeling_auto, f"MODEL_FOR_{KINDS[kind]}_MAPPING_NAMES")
    return {name: value if isinstance(value, str) else value[0] for name, value in table.items()}


def tiny(model_type: str, class_name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A tiny model of the class; all parameters are random, so that a forgotten one shows.

    Raises:
        Exception: whatever transformers raises where the config or the model cannot be built so small, or wants a package.
    """
    model_class = getattr(transformers, class_name)
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**_fields(config_class, OWN.get(model_type, {})))
    for name, value in ATTRIBUTES.get(model_type, {}).items():
        *parts, last = name.split(".")
        setattr(reduce(getattr, parts, config), last, value)
    wanted = getattr(model_class, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        text = config.get_text_config(decoder=True)
        config = text if isinstance(text, wanted) else config
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(deepcopy(config)).parameters())
    if size > MOST_PARAMETERS:
        raise S2FTError(f"{class_name} has {size:,} parameters where it should be tiny; give it sizes in OWN")
    model: PreTrainedModel = model_class(config).to(dtype).eval()
    model.set_experts_implementation("eager")  # grouped products have no float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs_of(model: PreTrainedModel) -> dict[str, Any]:
    """Random inputs for `model(**inputs)`: text, else images, else frames of sound."""
    names = inspect.signature(model.forward).parameters
    found: dict[str, Any] = {}
    main = main_input(model)
    if main == "input_ids":
        found[main] = torch.randint(10, VOCABULARY, (2, 9))
    else:
        found[main] = torch.randn(2, *dummy_inputs(model)[main].shape[1:], dtype=model.dtype)
    if "use_cache" in names:
        found["use_cache"] = False
    if model.config.is_encoder_decoder or "decoder_input_ids" in names:
        found["decoder_input_ids"] = torch.randint(10, VOCABULARY, (2, 7))
    if (own := INPUTS.get(model.config.model_type)) is not None:
        found |= own(model.dtype)
    return found


def output_of(model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The first tensor that the model returns: logits where it has them."""
    result = model(**inputs)
    output = getattr(result, "logits", None)
    while not isinstance(output, Tensor):
        output = result = result[0]
    return output


def _layers(default: PreTrainedConfig, own: dict[str, Any]) -> dict[str, Any]:
    """One layer of each type that the default has, at least two, where a config lists what each of its layers is."""
    depth = getattr(default, "num_hidden_layers", None)
    lists = {
        field.name: value
        for field in dataclasses.fields(default)
        if isinstance(value := getattr(default, field.name, None), list)
        and len(value) == depth
        and field.name not in own
    }
    if not lists or "num_hidden_layers" in own:
        return {}
    types = list(zip(*lists.values(), strict=True))
    first = sorted({types.index(one) for one in types} | {0, 1})
    return {"num_hidden_layers": len(first), **{name: [value[i] for i in first] for name, value in lists.items()}}


def _alike(value: Any, default: Any) -> Any:
    """A value for each stage, where the default has one for each."""
    is_staged = isinstance(default, list | tuple) and isinstance(value, int)
    return [value] * len(default) if is_staged else value


def _fields(config_class: type[PreTrainedConfig], own: dict[str, Any]) -> dict[str, Any]:
    """The values that this config takes of `SIZES` and `own`, and so for its parts."""
    aliases = getattr(config_class, "attribute_map", {})
    named = {field.name for field in dataclasses.fields(config_class)} | set(aliases)
    values = {name: value for name, value in {**SIZES, **own}.items() if name in named and value is not None}
    values = {name: value for name, value in values.items() if aliases.get(name) not in values}
    default = config_class()
    default.allow_global_per_layer_attribute_access = True  # of Gemma 4, whose layers differ
    values = {name: _alike(value, getattr(default, name, None)) for name, value in values.items()}
    if "qk_rope_head_dim" in values:  # latent attention: a key for each query, of the same two parts
        values = {**values, **{name: value for name, value in _LATENT.items() if name in values}, **own}
    values |= _layers(default, own)
    is_by_layer = any(isinstance(value, dict) for value in (getattr(default, "rope_parameters", None) or {}).values())
    if "mrope_section" in getattr(config_class, "ignore_keys_at_rope_validation", ()) and not is_by_layer:
        values.setdefault("rope_parameters", SECTIONS)
    for name, part in (getattr(config_class, "sub_configs", None) or {}).items():
        kind: Any = type(getattr(default, name, None)) if part.__name__ == "AutoConfig" else part
        if kind is type(None):
            continue
        inner = {key: value for key, value in own.items() if not isinstance(value, dict)} | own.get(name, {})
        values[name] = {**_fields(kind, inner), "model_type": kind.model_type}
    return values
