"""A GGUF adapter, read back: names that the base's file has too, rows in llama.cpp's order, scale 1."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import s2ft
from adapter_files import write_tensors
from exported import SIDES, load_base, save_adapter, save_base
from s2ft import S2FTError
from s2ft.adapters.file import read_adapter
from s2ft.exports.gguf import ARCHITECTURES

gguf = pytest.importorskip("gguf")

NAMES = {
    ".q_proj": "attn_q",
    ".k_proj": "attn_k",
    ".v_proj": "attn_v",
    ".o_proj": "attn_output",
    ".up_proj": "ffn_up",
    ".down_proj": "ffn_down",
    ".qkv_proj": "attn_qkv",
    ".gate_up_proj": "ffn_up",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def reference_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k, written as it is documented there."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def values(tensor: object) -> torch.Tensor:
    """A tensor of the file, in float64."""
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        raw = torch.from_numpy(np.array(tensor.data)).view(torch.bfloat16)
        return raw.view(*reversed(tensor.shape.tolist())).double()
    return torch.from_numpy(np.array(tensor.data)).double()


def text(reader: object, key: str) -> str:
    return bytes(reader.fields[key].parts[-1]).decode()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "llama-mqa", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2"])
def test_the_file_holds_every_delta(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = save_base(tmp_path / "base", family, torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, SIDES["both"])
    file = adapter / "adapter_model.safetensors"
    write_tensors(adapter, {n: t.to(dtype) if t.is_floating_point() else t for n, t in load_file(file).items()})
    s2ft.export(adapter, "gguf", tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    config = load_base(base).config
    assert text(reader, "general.type") == "adapter"
    assert text(reader, "adapter.type") == "lora"
    assert text(reader, "general.architecture") == ARCHITECTURES[config.model_type]
    assert reader.fields["adapter.lora.alpha"].parts[-1][0] == 0
    tensors = {tensor.name: values(tensor) for tensor in reader.tensors}
    native = read_adapter(adapter)
    assert len(tensors) == 2 * len(native.slices)
    for module, chosen in native.slices.items():
        block = next(part for part in module.split(".") if part.isdigit())
        name = f"blk.{block}.{next(ours for theirs, ours in NAMES.items() if module.endswith(theirs))}.weight"
        found = tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
        wanted = torch.zeros(found.shape, dtype=torch.float64)
        wanted[(slice(None), chosen.indices) if chosen.side == "in" else chosen.indices] = native.deltas[
            module
        ].double()
        if ARCHITECTURES[config.model_type] == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            wanted = torch.from_numpy(reference_order(wanted.numpy(), heads))
        assert torch.equal(found, wanted), module


def test_other_models_and_dtypes_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import OlmoConfig, OlmoForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    OlmoForCausalLM(OlmoConfig(vocab_size=61, **sizes)).save_pretrained(tmp_path / "olmo")
    adapter = save_adapter(tmp_path / "a", tmp_path / "olmo", 0.5)
    with pytest.raises(S2FTError, match=r"model_type='olmo'.*convert_lora_to_gguf"):
        s2ft.export(adapter, "gguf", tmp_path / "out.gguf")
    base = save_base(tmp_path / "base", "llama", torch.float64)
    adapter = save_adapter(tmp_path / "b", base, 0.5)
    with pytest.raises(S2FTError, match=r"torch\.float64; a GGUF adapter holds float32"):
        s2ft.export(adapter, "gguf", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, 0.5)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(S2FTError, match=r"pip install 's2ft\[gguf\]'"):
        s2ft.export(adapter, "gguf", tmp_path / "out.gguf")
