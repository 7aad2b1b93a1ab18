"""Merging into a quantised base: a plain model of its dequantised values, and, if asked for, that model quantised again.

    base, quantised by itself or by `quantize`  →  dequantised, layer by layer  →  + slices, rounded once  →  plain files
                                                                                 →  quantised again by `quantize`

The plain model's dtype is the stored base's own. Quantising again rounds the slices too: how much of each is lost is said.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from s2ft.adapters.answer_end import name_end, noted_end
from s2ft.adapters.file import AdapterFile, open_adapter
from s2ft.common.errors import S2FTError
from s2ft.common.files import new_folder
from s2ft.common.outputs import check_free
from s2ft.layer.dequantise import quantised_layers, values_of
from s2ft.runtime.models import load_config, load_model, load_tokenizer
from s2ft.runtime.quantisation import QUANTISATIONS, check_quantisation, own_quantisation


def has_quantised_base(adapter: str | Path, base: str | None = None) -> bool:
    """Whether the adapter's base, or the one that is named, is quantised by itself."""
    return own_quantisation(*open_adapter(adapter).base(base)) is not None


def merge_quantised(
    adapter: str | Path, output: str | Path, base: str | None, quantize: str | None, requantize: bool = False
) -> dict[str, float]:
    """Writes the dequantised base with the adapter merged into it, whole or not at all, with its tokenizer.

    Args:
        adapter: Folder of an S²FT adapter.
        output: A new folder.
        base: Folder or Hub name of its base; by default the one that the adapter names, at its revision.
        quantize: As it was quantised for training, by `s2ft train --quantize`; None: it is quantised already.
        requantize: Quantise the merged model again by `quantize`.

    Returns:
        With `requantize`, module → how much of its slice rounding took: ‖lost‖ / ‖slice‖, from 0; else nothing.

    Raises:
        S2FTError: before anything is written, if the adapter is damaged or not for this base, a package is missing, or
            merged values do not fit the base's dtype.
    """
    output, opened = Path(output), open_adapter(adapter)
    check_free(output)
    if requantize and quantize is None:
        raise S2FTError(f"requantize=True needs quantize, one of {', '.join(QUANTISATIONS)}")
    name, revision = opened.base(base)
    check_quantisation(quantize, name, revision)
    dtype, tokenizer = _stored_dtype(name, revision), load_tokenizer(name, revision)
    end = noted_end(opened.folder, lambda: tokenizer)
    model = load_model(name, dtype, quantize, revision)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    with new_folder(output) as aside:
        losses = _save_again(merged, aside, opened, dtype, str(quantize)) if requantize else _save(merged, aside)
        tokenizer.save_pretrained(aside)
        if end is not None:
            name_end(aside, end)
    return losses


def _stored_dtype(name: str, revision: str | None) -> torch.dtype:
    dtype = getattr(load_config(name, revision), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _save(merged: PreTrainedModel, aside: Path) -> dict[str, float]:
    merged.save_pretrained(aside)
    return {}


def _save_again(
    merged: PreTrainedModel, aside: Path, adapter: AdapterFile, dtype: torch.dtype, quantize: str
) -> dict[str, float]:
    with TemporaryDirectory(dir=aside) as plain:  # as large as the base, so on the disk that was chosen for it
        merged.save_pretrained(plain)
        again = load_model(plain, dtype, quantize)
    try:
        again.save_pretrained(aside)
    except ValueError as error:  # transformers has no way to store this kind
        raise S2FTError(f"quantize={quantize!r} cannot be stored by transformers; leave requantize out") from error
    layers = quantised_layers(again)
    return {
        module: _lost(values_of(layers[module]), merged.get_parameter(f"{module}.weight"), adapter, module)
        for module in adapter.slices
        if module in layers
    }


@torch.no_grad()
def _lost(
    rounded: Tensor,  # [out_features, in_features]
    exact: Tensor,  # [out_features, in_features]
    adapter: AdapterFile,
    module: str,
) -> float:
    trained, delta = adapter.slices[module], adapter.delta(module)
    lost = trained.of(rounded.float().cpu()) - trained.of(exact.float().cpu())
    return float(lost.norm() / delta.float().norm().clamp(min=torch.finfo(torch.float32).tiny))
