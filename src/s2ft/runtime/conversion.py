"""A GGUF model as a Hugging Face folder: plain float32 weights, which hold the quantised values exactly."""

from __future__ import annotations

from pathlib import Path

import torch

from s2ft.common.errors import S2FTError
from s2ft.common.files import new_folder
from s2ft.common.outputs import check_free
from s2ft.runtime.gguf import gguf_file
from s2ft.runtime.lookup import check_folder
from s2ft.runtime.models import load_model, load_tokenizer


def convert(source: str, output: Path) -> None:
    """Writes the model, its tokenizer and chat template to the new folder `output`, whole or not at all.

    Args:
        source: A GGUF file, or a folder with one.
        output: A new folder.

    Raises:
        S2FTError: if there is no such file, transformers cannot read it, something lies at `output` or the disk is full.
    """
    check_free(output)
    check_folder(source)
    if gguf_file(source) is None:
        raise S2FTError(f"model={source!r} is no GGUF file, so there is nothing to convert; use it as it is")
    tokenizer, model = load_tokenizer(source), load_model(source, torch.float32)
    with new_folder(output) as aside:
        tokenizer.save_pretrained(aside)
        model.save_pretrained(aside)
