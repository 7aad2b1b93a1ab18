"""Is the gradient of every slice right on each quantisation? Against full autograd on the dequantised model.

A tiny random Llama is quantised in every way of `s2ft train --quantize`, and packed as GPTQ, AWQ and float8 checkpoints are. On
each, slices of all projections are trained for one step; the reference is a plain float32 model of the dequantised weights
with the deltas in them, whose weights have all their gradients.

    gradient_error      the slice that differs most: ‖found - expected‖ / ‖expected‖
    own_error           the library's own gradient of a layer's input, likewise; None where it gives none
    reason              why there are no figures: a package that is missing, or what transformers says
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from s2ft.common.errors import S2FTError
from s2ft.format.config import S2FTConfig
from s2ft.format.terms import PROJECTIONS
from s2ft.lab.bench.packed import METHODS, write_packed
from s2ft.lab.bench.report import Report
from s2ft.lab.registry import TellShare
from s2ft.layer.dequantise import keep_trainable, quantised_layers, values_of
from s2ft.layer.linear import sliced_layers
from s2ft.runtime.models import load_model
from s2ft.runtime.quantisation import QUANTISATIONS, REFUSED
from s2ft.runtime.trainable import gradient_error

Row = dict[str, Any]

SIZES = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
RATIO = 0.5  # of the heads and channels of each projection
BATCH, LENGTH = 2, 16


def bench_quantised(seed: int = 0, tell: TellShare = lambda done: None) -> Report:
    """Rows: quantisation, layer, slices, gradient_error, own_error, reason; on the accelerator where there is one."""
    names = [*QUANTISATIONS, *METHODS, *REFUSED]
    rows = []
    with TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        base = LlamaForCausalLM(LlamaConfig(**SIZES))
        base.save_pretrained(Path(folder, "plain"))
        for number, name in enumerate(names):
            rows.append({"quantisation": name, **_row(name, base, Path(folder))})
            tell((number + 1) / len(names))
    settings = {"model": SIZES, "ratio": RATIO, "batch_size": BATCH, "seq_len": LENGTH, "seed": seed}
    return Report(settings=settings, rows=rows)


def quantised_line(row: Row) -> dict[str, str]:
    """A row of the table."""

    def shown(key: str) -> str:
        return "–" if row[key] is None else f"{row[key]:.1e}"

    return {
        "quantisation": row["quantisation"],
        "layer": row["layer"] or "–",
        "slices": str(row["slices"] or "–"),
        "gradient error": shown("gradient_error"),
        "library's own": shown("own_error"),
        "": row["reason"] or "",
    }


def _row(name: str, base: PreTrainedModel, folder: Path) -> Row:
    try:
        model = _loaded(name, base, folder)
        layers = quantised_layers(model)
        if not layers:
            raise S2FTError("transformers loads it dequantised on this machine: a plain model")
        keep_trainable(model)
        twin = _dequantised(model, layers)
        first = next(iter(layers.values()))
        own, kind = gradient_error(first), type(first).__name__
        errors = _gradient_errors(model.train(), twin)
    except S2FTError as error:
        reason = str(error).replace(str(folder), "")
        return {"layer": None, "slices": None, "gradient_error": None, "own_error": None, "reason": reason}
    return {
        "layer": kind,
        "slices": len(errors),
        "gradient_error": float(np.max(errors)),
        "own_error": own,
        "reason": None,
    }


def _loaded(name: str, base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    if name in QUANTISATIONS:
        return load_model(str(folder / "plain"), torch.float32, name)
    if name in METHODS:
        write_packed(base, folder / name, name)
        return load_model(str(folder / name), torch.float32)
    raise S2FTError(REFUSED[name])


def _dequantised(model: PreTrainedModel, layers: dict[str, nn.Module]) -> PreTrainedModel:
    """A plain float32 model, on the same device, of the values that the quantised one stands for."""
    twin = LlamaForCausalLM(LlamaConfig(**SIZES)).to(model.device)
    own = dict(twin.named_parameters())
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path in own and path.removesuffix(".weight") not in layers:
                own[path].copy_(parameter)
        for path, layer in layers.items():
            own[f"{path}.weight"].copy_(values_of(layer))
    return twin.train()


def _gradient_errors(model: PreTrainedModel, twin: PreTrainedModel) -> list[float]:
    """Of each slice."""
    ratios = {name: RATIO for name in PROJECTIONS if name != "out_proj"}
    tuned = get_peft_model(model, S2FTConfig(ratios=ratios, seed=0, init_weights=False))
    ids = torch.arange(BATCH * LENGTH, device=model.device).view(BATCH, LENGTH) % SIZES["vocab_size"]
    expected = _dense_gradients(tuned, twin, ids)
    tuned(input_ids=ids, labels=ids).loss.backward()
    errors = []
    for path, layer in sliced_layers(tuned.get_base_model(), "default").items():
        found = layer.block("default").weight.grad
        assert found is not None
        errors.append(float((found.double() - expected[path]).norm() / expected[path].norm()))
    return errors


def _dense_gradients(
    tuned: PeftModel,
    twin: PreTrainedModel,
    ids: Tensor,  # [batch, length]
) -> dict[str, Tensor]:  # module → its slice's, in float64
    """By full autograd, of whole weights with the deltas in them."""
    layers = sliced_layers(tuned.get_base_model(), "default")
    for path, layer in layers.items():
        twin.get_submodule(path).weight.data += layer.get_delta_weight("default")
    twin(input_ids=ids, labels=ids).loss.backward()
    found = {}
    for path, layer in layers.items():
        block, gradient = layer.block("default"), twin.get_parameter(f"{path}.weight").grad
        assert gradient is not None
        found[path] = gradient.index_select(block.dim, block.indices.to(gradient.device)).double()
    return found
