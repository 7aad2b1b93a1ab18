"""The frozen models of the training benchmark: random weights of given shapes, or a model of the user's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from s2ft.layer.dequantise import keep_trainable
from s2ft.runtime.models import empty_model, load_model, place
from s2ft.runtime.precision import choose_precision

log = logging.getLogger("s2ft")

Source = Mapping[str, Any] | str  # shapes (`lab/shapes.py`); or a folder, a GGUF file, a name on the Hub


def shell(source: Source) -> PreTrainedModel:
    """The model without values (device meta).

    Raises:
        S2FTError: if there is no such model.
    """
    if isinstance(source, str):
        return empty_model(source)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(source))


def frozen_base(
    source: Source, device: str, dtype: torch.dtype, liger: bool, quantize: str | None = None
) -> PreTrainedModel:
    """The model, frozen, in training mode, without dropout; with Liger's kernels, or quantised, if asked for."""
    if isinstance(source, str):
        base = load_model(source, dtype, quantize)
        place(base, device)
    else:
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(_config(source), dtype=dtype)
        if quantize is not None:
            base = _quantised(base, dtype, quantize)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=base)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return base.requires_grad_(False).train()


def _config(shapes: Mapping[str, Any]) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.for_model(**{"model_type": "llama", **shapes})
    return config


def _quantised(base: PreTrainedModel, dtype: torch.dtype, quantize: str) -> PreTrainedModel:
    """The model, saved and loaded again as `s2ft train` loads it."""
    with TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        model = load_model(folder, dtype, quantize)
    keep_trainable(model)
    return model


def settle_dtype(wanted: str, device: str) -> tuple[torch.dtype, str]:
    """The dtype of the weights, and why; says so, and warns of one that the device does not multiply."""
    dtype, reason = choose_precision(wanted, device)
    log.info("dtype: %s", reason)
    if dtype == torch.bfloat16 and choose_precision("auto", device)[0] != dtype:
        log.warning("this %s does not multiply bf16, so each step takes much longer than in fp32", device.upper())
    return dtype, reason
