"""What some families want otherwise than the general rules of `tiny` have it: sizes, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HIDDEN, VOCABULARY, IMAGE, FRAMES = 32, 64, 64, 64
IMAGE_TOKEN = 5

SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}

BY_LAYER = {"sliding_attention": SECTIONS, "full_attention": SECTIONS}

_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}

OWN: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3],
        "hidden_size_global": HIDDEN,
        "patching_threshold": 99.0,
        "max_patch_length": 4,
    },
    "canary": {"subsampling_conv_channels": 8},
    "chameleon": {"vocabulary_map": {"<image>": IMAGE_TOKEN}, "base_channels": 32, "latent_channels": 32},
    "blip-2": {"num_query_tokens": 3},
    "cohere_asr": {"subsampling_conv_channels": 8},
    "cohere_compass": {"text_config": {"rope_parameters": BY_LAYER}},
    "cohere_compass_text": {"rope_parameters": BY_LAYER},
    "instructblipvideo": {"num_query_tokens": 3},
    "kosmos-2": {"latent_query_num": 3},
    "convnext": {"num_stages": 4, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1], "patch_size": 4},
    "convnextv2": {"num_stages": 4, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1], "patch_size": 4},
    "cvt": {"embed_dim": [16, 24, 32], "num_heads": [1, 3, 4], "depth": [1, 2, 3]},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "dia": {
        "delay_pattern": [0, 1, 2],
        "decoder_config": {"num_channels": 3, "cross_hidden_size": HIDDEN, "cross_head_dim": 8},
        **dict.fromkeys(("cross_num_attention_heads", "cross_num_key_value_heads"), 4),
    },
    "diffusion_gemma": {"top_k_experts": 2},
    "dots3_note": {
        **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size"), HIDDEN),
        "downsample_hidden_size": 16,
        "text_config": {"num_hidden_layers": 2},
    },
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320},
    "emu3": {"vocabulary_map": {"<image>": IMAGE_TOKEN, "<|extra_200|>": 6}, "base_channels": 32, "codebook_size": 16},
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma4_unified": dict.fromkeys(("mm_posemb_size", "mm_embed_dim", "output_proj_dims", "audio_embed_dim"), HIDDEN),
    "glm5_next": {"index_kpool": 2, "qk_rope_head_dim": 0, "linear_head_dim": 8, "linear_num_heads": 4},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 1]],
        "spatial_target_layers": [0],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "hiera": {
        "image_size": [64, 64],
        "patch_size": [7, 7],
        "embed_dim": 16,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 2, 4],
    },
    "inkling2": {name: {"text_hidden_size": HIDDEN} for name in ("vision_config", "audio_config")},
    "janus": {"base_channels": 32, "num_embeddings": 16},
    "molmo2": {"vision_feature_layer": [1, 0], "text_hidden_size": HIDDEN},
    "muse_spark": {
        "moe_hidden_size": HIDDEN,
        "projector_hidden_size": HIDDEN,
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 1, 1]},
    },
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4},
    "bamba": {"attn_layer_indices": [1]},
    "data2vec-vision": {"layer_scale_init_value": 1.0},
    "donut-swin": {"patch_size": 4, "window_size": 2},
    "dots3_note_text": {"num_hidden_layers": 2},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 1, "num_hidden_layers": 3, "intermediate_size": [48] * 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "mobilevitv2": {"patch_size": 2},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "nemo_speechlm": {"head_config": {"audio_hidden_size": HIDDEN}},
    "neomme": {"head_dim": 16},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "swin": {"patch_size": 4, "window_size": 2},
    "swinv2": {"patch_size": 4, "window_size": 2},
    "xmod": {"default_language": "en_XX"},
    "paddleocr_vl": {"text_config": {"rope_parameters": SECTIONS}},
    "seamless_m4t": {"speech_encoder_intermediate_size": 48},
    "seamless_m4t_v2": {"speech_encoder_intermediate_size": 48},
    "step3p7": {"sliding_window": 8},
    "zaya": {"num_experts_per_tok": 1},
}
"""model_type → fields that have to be other than in `SIZES`; None: transformers' default."""


def _text(length: int = 9, images: int = 0) -> Tensor:  # [2, length], int64
    """Tokens, the first of them places for parts of an image."""
    tokens = torch.randint(10, VOCABULARY, (2, length))
    tokens[:, :images] = IMAGE_TOKEN
    return tokens


def _images(dtype: torch.dtype, *size: int) -> Tensor:  # [2, *size]
    return torch.randn(2, *(size or (3, IMAGE, IMAGE)), dtype=dtype)


ATTRIBUTES: dict[str, dict[str, Any]] = {
    "moonshine_streaming": {"num_key_value_heads": 4},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "shieldgemma2": {"yes_token_index": 11, "no_token_index": 12},
}
"""model_type → what the model's code reads off its config, though the config has no such field."""


INPUTS: dict[str, Callable[[torch.dtype], dict[str, Any]]] = {
    "blip-2": lambda dtype: {"pixel_values": _images(dtype), "input_ids": _text(images=3)},
    "instructblipvideo": lambda dtype: {
        "pixel_values": _images(dtype, 4, 3, IMAGE, IMAGE),
        "input_ids": _text(12, images=12),
        "qformer_input_ids": _text(),
    },
    "canary": lambda dtype: {"input_features": _images(dtype, FRAMES, 8)},
    "cohere_asr": lambda dtype: {"input_features": _images(dtype, FRAMES, 8)},
    "dia": lambda dtype: {"decoder_input_ids": torch.randint(10, VOCABULARY, (2, 7, 3))},
    "kosmos-2": lambda dtype: {
        "pixel_values": _images(dtype),
        "input_ids": _text(),
        "image_embeds_position_mask": torch.arange(9).expand(2, 9) < 3,
    },
    "voxtral_realtime": lambda dtype: {"input_ids": _text(8), "input_features": _images(dtype, 8, 64)},
    "blip": lambda dtype: {"input_ids": _text()},
    "idefics": lambda dtype: {
        "pixel_values": _images(dtype, 1, 3, IMAGE, IMAGE),
        "image_attention_mask": torch.ones(2, 9, 1, dtype=torch.int64),
    },
    "siglip2": lambda dtype: {
        "pixel_values": _images(dtype, 16, 768),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int64),
        "spatial_shapes": torch.full((2, 2), 4),
    },
    "udop": lambda dtype: {"bbox": torch.rand(2, 9, 4, dtype=dtype)},
}
"""model_type → what it is called with beside or instead of what the general rules find."""
