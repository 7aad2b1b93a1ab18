"""Models in llama.cpp's format, GGUF: transformers undoes their quantisation, and the result is a model like any other.

model.gguf, or a folder that holds one .gguf file and no config.json     what --model may name
s2ft base model.gguf --output DIR                                       the same as a Hugging Face folder, once for all
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2ft.common.errors import S2FTError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUFFIX = ".gguf"
_MAGIC = b"GGUF"


def gguf_file(name: str) -> Path | None:
    """The GGUF file that `name` means: itself, or the only one in a folder without `config.json`; else None.

    Raises:
        S2FTError: if a folder holds several of them.
    """
    path = Path(name)
    if path.suffix.lower() == SUFFIX and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = sorted(file for file in path.iterdir() if file.suffix.lower() == SUFFIX)
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise S2FTError(f"model={name!r} holds {len(found)} GGUF files ({names}); name the one that is meant")
    return found[0] if found else None


def check_gguf(file: Path) -> None:
    """Raises `S2FTError` if `file` is no GGUF file, or the library that reads them is missing."""
    with file.open("rb") as opened:
        start = opened.read(len(_MAGIC))
    if start != _MAGIC:
        raise S2FTError(f"model={str(file)!r} is no GGUF file: it does not start with {_MAGIC.decode()!r}")
    if find_spec("gguf") is None:
        raise S2FTError(f"model={str(file)!r}: reading GGUF needs the package gguf: pip install 's2ft[gguf]'")


def reading(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` of a config or tokenizer takes for `name`: where, and the options besides."""
    file = gguf_file(name)
    return (name, {}) if file is None else (str(file.parent), {"gguf_file": file.name})


def dequantising() -> dict[str, Any]:
    """The option by which a model comes in plain tensors; before transformers 5.20 there was no other way."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def make_plain(model: PreTrainedModel, name: str) -> None:
    """The model, whose weights are plain tensors by now, no longer says that it is quantised: it trains and is saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    model.name_or_path = model.config.name_or_path = name  # not the folder around it, which adapters would note
