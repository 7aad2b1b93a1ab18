"""An adapter as a GGUF LoRA file, which llama.cpp and what builds on it load beside a GGUF base.

    general.type = adapter    adapter.type = lora    adapter.lora.alpha = 0
    blk.{layer}.attn_output.weight.lora_a  [r, in]    blk.{layer}.attn_output.weight.lora_b  [out, r]   ...

llama.cpp scales every layer by alpha / r with one alpha for all; alpha = 0 means scale 1, which is right at any rank.
Its converter reorders the rows of q and k in Llama models, from halves (a rotation pairs row j with row j + d/2) to
neighbours (2j with 2j + 1), head by head; the rows of an adapter go the same way.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2ft.adapters.checkpoint import Checkpoint
from s2ft.adapters.file import AdapterFile
from s2ft.common.errors import S2FTError, raise_together
from s2ft.common.outputs import Progress
from s2ft.exports.lora import factors

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
"""transformers' `model_type` → llama.cpp's architecture, where a GGUF file holds the linear layers as the checkpoint does."""

_REORDERED = "llama"  # the architecture whose rows of q and k lie in another order
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problems(adapter: AdapterFile) -> list[str]:
    """What a GGUF adapter cannot hold."""
    found = [f"{name}: a GGUF adapter holds slices alone; use `s2ft merge`" for name in adapter.kept]
    first = adapter.delta(next(iter(adapter.slices)))
    if first.dtype not in _DTYPES:
        found.append(f"the deltas are {first.dtype}; a GGUF adapter holds float32, bfloat16 or float16")
    return found


def write(adapter: AdapterFile, base: Checkpoint, output: Path, progress: Progress) -> None:
    """Writes the adapter into one GGUF file.

    Raises:
        S2FTError: if llama.cpp knows no such model or layer, or the package gguf is missing.
    """
    gguf, architecture = _gguf(), _architecture(base)
    names = _tensor_names(adapter, base, architecture)
    with closing(gguf.GGUFWriter(output, architecture)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        for module in progress(list(adapter.slices)):
            trained = adapter.slices[module]
            low = factors(trained, adapter.delta(module), base.sliced_size(module, trained.side))
            _add(writer, f"{names[module]}.weight.lora_a", low.a)
            _add(writer, f"{names[module]}.weight.lora_b", _rows(base, architecture, module, low.b))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    _check_whole(output, 2 * len(adapter.slices))


def _architecture(base: Checkpoint) -> str:
    kind = base.model.config.model_type
    if kind not in ARCHITECTURES:
        raise S2FTError(
            f"model_type={kind!r}: s2ft writes GGUF adapters for {', '.join(ARCHITECTURES)}. Export --to lora, and convert "
            "that with llama.cpp's convert_lora_to_gguf.py"
        )
    return ARCHITECTURES[kind]


def _tensor_names(adapter: AdapterFile, base: Checkpoint, architecture: str) -> dict[str, str]:
    """Module → the name of its tensor in llama.cpp, by gguf's own table."""
    gguf = _gguf()
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, base.model.config.num_hidden_layers)
    names = {module: table.get_name(module) for module in adapter.slices}
    raise_together(
        f"llama.cpp's {architecture} has no tensor for {module}; a GGUF adapter cannot carry it"
        for module, name in names.items()
        if name is None
    )
    return names


def neighbours(rows: Tensor, heads: int) -> Tensor:  # [heads * head_dim, *], as is the result
    """Rows of q or k in llama.cpp's order: within each head, row j of the second half follows row j of the first.

    Example:
        >>> neighbours(torch.arange(8), heads=2).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    halves = rows.view(heads, 2, -1, *rows.shape[1:])  # [heads, 2, head_dim / 2, *]
    return halves.transpose(1, 2).flatten(0, 2)


def _rows(base: Checkpoint, architecture: str, module: str, b: Tensor) -> Tensor:  # both [out_features, r]
    config, name = base.model.config, module.rpartition(".")[2]
    if architecture != _REORDERED or name not in ("q_proj", "k_proj"):
        return b
    return neighbours(b, config.num_attention_heads if name == "q_proj" else config.num_key_value_heads)


def _add(writer: Any, name: str, tensor: Tensor) -> None:  # tensor: of any shape, in one of _DTYPES
    gguf = _gguf()
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16: its bytes, with the type beside
        raw = tensor.view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.numpy())


def _check_whole(file: Path, count: int) -> None:
    """NumPy, by which gguf writes, does not notice that the disk is full where the last bytes are still buffered."""
    try:
        found = len(_gguf().GGUFReader(file).tensors)
    except (ValueError, IndexError):  # a tensor, or the list of them, goes on beyond the end
        found = None
    if found != count:
        raise S2FTError(f"{file.name} was not written whole, so it is not kept: is the disk full?")


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise S2FTError("a GGUF adapter needs the package gguf: pip install 's2ft[gguf]'") from error
    return gguf
