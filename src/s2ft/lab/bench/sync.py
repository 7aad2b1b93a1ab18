"""How many bytes put one adapter into a running engine? All in the dtype of the model's weights.

    first      `s2ft.sync`: channels, new values and the base's own
    later      the same without the base's own, which the engine has after the first: each step of `SliceSync`
    lora       a LoRA of as many parameters
    exported   the adapter as a LoRA (`s2ft export --to lora`), with the factor that only picks channels
    tensors    every weight that changes, whole
    whole      all weights: what a trainer sends that merges its adapter
    sent       what an engine really got from `s2ft.sync`, where the model is at hand, and `exported_sent` of the export

Shapes without values count as those with values do: the same messages are made of tensors on device meta.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load, load_file
from torch import nn
from transformers import PreTrainedModel

from s2ft.adapters.stored import places, plain_numbers
from s2ft.common.errors import S2FTError
from s2ft.demo import base_path
from s2ft.exports.export import export
from s2ft.exports.sync import Sent, sizes, sync
from s2ft.format.config import S2FTConfig
from s2ft.format.folder import WEIGHTS_FILE
from s2ft.format.slices import Slice
from s2ft.lab.bench.bases import Source, shell
from s2ft.lab.bench.report import Report
from s2ft.lab.registry import TellShare
from s2ft.lab.shapes import LLAMA2_7B, LLAMA3_70B
from s2ft.layer.linears import features
from s2ft.layer.stacked import linear_at
from s2ft.runtime.models import load_model
from s2ft.selection.select import select
from s2ft.tuner.model import S2FTModel  # noqa: F401 - PEFT knows the method from here on

SHAPES: Mapping[str, Source] = {"LLaMA2-7B": LLAMA2_7B, "LLaMA3-70B": LLAMA3_70B}

Row = dict[str, Any]


class Sink:
    """An engine that counts what it is sent."""

    bytes = 0

    def start_weight_update(self) -> None:
        """Begins."""

    def update_weights(self, request: dict[str, Any]) -> None:
        """Counts the tensors of a message."""
        self.bytes += sum(one.nbytes for one in load(base64.b64decode(request["update_info"]["tensors"])).values())

    def finish_weight_update(self) -> None:
        """Ends."""

    def reset_prefix_cache(self) -> None:
        """Has none."""


def bench_sync(
    model: str | None = None,
    budget: float = 0.01,
    shapes: Mapping[str, Source] = SHAPES,
    tell: TellShare = lambda done: None,
) -> Report:
    """Rows: name, dtype, parameters, trained, and bytes: first, later, lora, exported, tensors, whole, sent, exported_sent.

    Raises:
        S2FTError: if there is no such model, or the budget trains nothing.
    """
    if model is not None and not Path(model).is_dir():
        raise S2FTError(f"model={model!r} is not a folder with a model in safetensors")
    folders = {"embedded": str(base_path()), **({} if model is None else {Path(model).name: model})}
    rows = []
    for name, source in {**folders, **shapes}.items():
        rows.append(_row(name, source, budget))
        if name in folders:
            rows[-1] |= _really_sent(folders[name], budget)
        tell(len(rows) / (len(folders) + len(shapes)))
    return Report(settings={"models": list(folders), "budget": budget}, rows=rows)


def _row(name: str, source: Source, budget: float) -> Row:
    model = shell(source)
    dtype = _dtype(model)
    slices = select(model, _config(budget)).slices
    first = [sent for path, trained in slices.items() for sent in _sent(model, path, trained, dtype)]
    known = sizes([replace(one, own=None) for one in first])
    weights = {id(one): one.numel() for one in model.parameters()}  # a tied one is sent once
    return {
        "name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(weights.values()),
        "trained": known.parameters,
        "first": sizes(first).bytes,
        "later": known.bytes,
        "lora": known.parameters * dtype.itemsize,
        "exported": dtype.itemsize * sum(_as_lora(model, path, trained) for path, trained in slices.items()),
        "tensors": known.merged_bytes,
        "whole": sum(weights.values()) * dtype.itemsize,
        "sent": None,
        "exported_sent": None,
    }


def _dtype(model: PreTrainedModel) -> torch.dtype:
    """That of a model's files; of shapes, bf16."""
    found = model.config.dtype
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def _config(budget: float) -> S2FTConfig:
    return S2FTConfig(budget=budget, seed=0, init_weights=False, task_type="CAUSAL_LM")


def _sent(model: nn.Module, path: str, trained: Slice, dtype: torch.dtype) -> Iterator[Sent]:
    inputs, outputs = _shape(model, path)
    across = outputs if trained.side == "in" else inputs
    for place in places(plain_numbers(f"{path}.weight", [outputs, inputs], trained.side), trained, across):
        values = torch.empty(len(place.picked), across, dtype=dtype, device="meta")
        yield Sent(place, values, values)


def _as_lora(model: nn.Module, path: str, trained: Slice) -> int:
    """Parameters of the slice as a LoRA: a rank for each channel."""
    return len(trained.indices) * sum(_shape(model, path))


def _shape(model: nn.Module, path: str) -> tuple[int, int]:
    layer = linear_at(model, path)
    assert layer is not None
    return features(layer)


def _really_sent(folder: str, budget: float) -> Row:
    engine = Sink()
    with TemporaryDirectory() as place:
        adapter = Path(place) / "adapter"
        base = load_model(folder, _dtype(shell(folder)))
        get_peft_model(base, _config(budget), autocast_adapter_dtype=False).save_pretrained(str(adapter))
        sync(engine, adapter)
        lora = export(adapter, "lora", Path(place) / "lora")
        exported = load_file(Path(lora.output) / WEIGHTS_FILE)
    return {"sent": engine.bytes, "exported_sent": sum(one.nbytes for one in exported.values())}


def sync_line(row: Row) -> dict[str, str]:
    """A row of the table: MB, and what part of the whole model the first message is."""
    kinds = ("first", "later", "lora", "exported", "tensors", "whole", "sent", "exported_sent")
    megabytes = {kind.replace("_", " "): "–" if row[kind] is None else f"{row[kind] / 1e6:.3g}" for kind in kinds}
    return {
        "MB of": f"{row['name']}, {row['dtype']}",
        **megabytes,
        "first / whole": f"{row['first'] / row['whole']:.3g}",
    }
