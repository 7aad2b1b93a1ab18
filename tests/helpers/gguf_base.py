"""A Llama checkpoint as a GGUF base, with its byte tokens or without a vocabulary: then token ids go in and come out.

llama.cpp's converter is not in its Python package; this writes what it would for such a model.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file


def write_base(
    folder: Path, file: Path, quantise: gguf.GGMLQuantizationType | None = None, vocabulary: bool = False
) -> dict[str, np.ndarray]:
    """From a folder with one safetensors file; returns the values that the file stands for, under the checkpoint's names.

    Args:
        quantise: How matrices are stored; None: all in float32.
        vocabulary: Whether the folder's tokenizer comes along.
    """
    config = json.loads((folder / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if vocabulary:
        _add_vocabulary(writer, folder)
    else:
        writer.add_tokenizer_model("none")
    stored = {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.to(torch.float32).numpy()
        if name.endswith("q_proj.weight"):
            values = rotary_pairs(values, heads)
        if name.endswith("k_proj.weight"):
            values = rotary_pairs(values, config["num_key_value_heads"])
        values, kind = np.ascontiguousarray(values), quantise if values.ndim == 2 else None
        data = values if kind is None else gguf.quants.quantize(values, kind)
        stored[name] = values if kind is None else gguf.quants.dequantize(data, kind)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _add_vocabulary(writer: gguf.GGUFWriter, folder: Path) -> None:
    """Byte tokens and the two that stand for themselves, as of the embedded base."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"] | {added["content"]: added["id"] for added in tokenizer["added_tokens"]}
    special = {added["content"] for added in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_scores([0.0] * len(tokens))  # in place of merges: bytes have none
    writer.add_eos_token_id(vocabulary["<|end|>"])
    writer.add_pad_token_id(vocabulary["<|pad|>"])
    if (folder / "chat_template.jinja").is_file():
        writer.add_chat_template((folder / "chat_template.jinja").read_text())


def rotary_pairs(weight: np.ndarray, heads: int) -> np.ndarray:  # [heads * head_dim, in]
    """In each head, the rows that a rotation pairs are brought side by side."""
    head_dim = len(weight) // heads
    order = [
        head * head_dim + half * head_dim // 2 + j
        for head in range(heads)
        for j in range(head_dim // 2)
        for half in (0, 1)
    ]
    return weight[order]
