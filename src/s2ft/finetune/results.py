"""What a run leaves in its folder: an adapter or a model, its README, its options, and the run card."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from s2ft.common.files import staged
from s2ft.data.template import turn_end
from s2ft.finetune.card import Card, write_card
from s2ft.finetune.methods import METHODS
from s2ft.finetune.model_card import model_card
from s2ft.finetune.options import TrainOptions, to_yaml
from s2ft.selection.coverage import parameter_counts


def section(options: TrainOptions) -> str:
    """Where the run card tells of what was trained: "adapter" or "model"."""
    return "model" if METHODS[options.method].leaves_model else "adapter"


def parameters(model: nn.Module) -> tuple[int, int]:
    """Those that the method trains (at a time), and those of the model without an adapter, however they are stored."""
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    return trainable, sum(parameter_counts(model).values())


def save_result(
    options: TrainOptions, model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: Card
) -> None:
    """Writes everything to `options.output`, each file whole or not at all.

    A model is brought to the dtype that its base was stored in, and gets the tokenizer along.
    """
    method, output, counts = METHODS[options.method], Path(options.output), parameters(model)
    end = turn_end(tokenizer) if card["data"]["format"] == "chat" else None
    end = None if end == tokenizer.eos_token_id else end
    if method.leaves_model:
        model.to(_stored_dtype(options.model))
        _name_end(model, end)
    with staged(output) as aside:
        model.save_pretrained(str(aside))
        if method.leaves_model:
            tokenizer.save_pretrained(str(aside))
        name = None if end is None else tokenizer.convert_ids_to_tokens(end)
        text = model_card(options.model, *counts, method=options.method, end=name)
        (aside / "README.md").write_text(text, encoding="utf-8")
        (aside / "run.yaml").write_text(f"# {command(options)}\n{to_yaml(options)}", encoding="utf-8")
        card[section(options)]["bytes"] = sum(path.stat().st_size for path in aside.glob("*.safetensors"))
    write_card(output, card)


def _name_end(model: PreTrainedModel, end: int | None) -> None:
    """Whoever loads the model finds where its answers end."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    if end is not None and end not in named:
        model.generation_config.eos_token_id = [end, *(token for token in named if token is not None)]


def command(options: TrainOptions, resume: bool = False) -> str:
    """The command line that runs these options again, from the file beside the result."""
    words = ["s2ft", "train", "--config", str(Path(options.output) / "run.yaml"), *(["--resume"] if resume else [])]
    return shlex.join(words)


def _stored_dtype(base: str) -> torch.dtype:
    dtype = getattr(AutoConfig.from_pretrained(base, trust_remote_code=False), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
