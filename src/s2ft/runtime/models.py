"""The base model and its tokenizer, from a folder, a GGUF file or the Hub, with errors that say what is missing.

Code that comes with a model is not run: unless it is told so, transformers asks at the terminal, and runs it on a "y".
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from s2ft.common.errors import S2FTError, first_line
from s2ft.runtime import gguf
from s2ft.runtime.failures import is_out_of_memory
from s2ft.runtime.lookup import check_folder
from s2ft.tuner.model import S2FTModel  # noqa: F401 - PEFT knows the method from here on


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model `name`.

    Raises:
        S2FTError: if there is no such model, or it has no tokenizer.
    """
    check_folder(name)
    try:
        source, options = gguf.reading(name)
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise S2FTError(_unloadable(name, "tokenizer", error)) from error


def load_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model `name`, its weights in `dtype`.

    Raises:
        S2FTError: if there is no such model, or its files are incomplete or of another kind.
    """
    check_folder(name)
    try:
        source, options = gguf.reading(name)
        options |= gguf.dequantising() if options else {"use_safetensors": True}  # the older .bin files are pickles
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, trust_remote_code=False, **options
        )
    except Exception as error:  # OSError, ValueError, SafetensorError, ...: what a broken or foreign file leads to
        if is_out_of_memory(error):
            raise
        raise S2FTError(_unloadable(name, "model", error)) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise S2FTError(
            f"model={name!r} is incomplete: it lacks {len(missing)} of its weights, the first is {missing[0]}"
        )
    if "gguf_file" in options:
        gguf.make_plain(model, name)
    return model


def empty_model(name: str) -> PreTrainedModel:
    """The causal language model `name` without values (device meta): its configuration alone is read.

    Raises:
        S2FTError: if there is no such model.
    """
    check_folder(name)
    try:
        with torch.device("meta"):
            source, options = gguf.reading(name)
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise S2FTError(_unloadable(name, "configuration", error)) from error


def positions(model: PreTrainedModel) -> int | None:
    """How many positions the model was made for; None where it does not say."""
    value = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _unloadable(name: str, part: str, error: Exception) -> str:
    if gguf.gguf_file(name) is not None:
        where = "a GGUF file, cut short or of a kind that transformers does not read"
    else:
        where = "the folder" if Path(name).is_dir() else "no folder here; the Hub"
    if "trust_remote_code" in str(error):
        return (
            f"model={name!r}: its {part} needs code that comes with it, and s2ft runs no such code; take another model"
        )
    return f"model={name!r}: its {part} cannot be loaded ({where}): {first_line(error)}"
