"""The base model to be served: loaded, checked, and made ready for adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from s2ft.common.errors import S2FTError, raise_together
from s2ft.evaluate.engines import end_ids
from s2ft.format.config import S2FTConfig
from s2ft.layer.linears import linear_layer
from s2ft.runtime.models import load_model, load_tokenizer, positions
from s2ft.tuner.model import S2FTModel

_NEEDED = ("position_ids", "past_key_values", "attention_mask", "logits_to_keep")  # of the model's `forward`
_ATTENTION = ("full_attention", "sliding_attention")  # whose keys and values rows can be put side by side


@dataclass(frozen=True, eq=False)
class Base:
    """A base model, ready for a pool of adapters."""

    tuner: S2FTModel
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]  # tokens that end an answer
    vocabulary: int  # how many tokens the model has
    positions: int | None  # how long prompt and answer can be together; None where the model does not say


def load_base(name: str, dtype: torch.dtype) -> Base:
    """The base model `name`, on the accelerator if there is one.

    Raises:
        S2FTError: if it cannot be loaded, or is of a kind whose rows cannot join and leave a batch.
    """
    tokenizer = load_tokenizer(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    model = load_model(name, dtype).to(accelerator or "cpu").eval()
    return prepared(model, tokenizer)


def prepared(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Base:
    """A loaded model as `load_base` gives it; the model is changed."""
    raise_together(_problems(model))
    ends, vocabulary = tuple(end_ids(model, tokenizer)), int(model.get_input_embeddings().weight.shape[0])
    return Base(_without_adapters(model), tokenizer, ends, vocabulary, positions(model))


def _problems(model: PreTrainedModel) -> Iterator[str]:
    kind = type(model).__name__
    parameters = inspect.signature(model.forward).parameters
    missing = [name for name in _NEEDED if name not in parameters]
    if missing:
        yield f"{kind} takes no {missing[0]}, so its rows cannot join a batch under way; serve it merged, by another engine"
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - set(_ATTENTION)
    if layers:
        yield f"{kind} has layers of {', '.join(sorted(layers))}; served are {' and '.join(_ATTENTION)}"


def _without_adapters(model: nn.Module) -> S2FTModel:
    """The tuner of a model that has no adapter; PEFT makes one with an adapter only, so that goes again."""
    path = next((path for path, module in model.named_modules() if linear_layer(module) is not None), None)
    if path is None:
        raise S2FTError(f"{type(model).__name__} has no linear layer, so no adapter fits it")
    tuner: Any = S2FTModel(model, S2FTConfig(slices={path: "in 0"}), "none")
    tuner.delete_adapter("none")
    tuner.eval()
    return tuner  # type: ignore[no-any-return]
