"""Which channels of which module an adapter trains, for the page's picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from s2ft.common.errors import S2FTError
from s2ft.format.config import S2FTConfig
from s2ft.format.slices import Slice
from s2ft.layer.linears import features
from s2ft.layer.stacked import linear_at


def channels(folder: Path, model: nn.Module) -> list[dict[str, Any]]:
    """For each slice: its module, a short name, the side, how many channels that side has, and those that are trained.

    Raises:
        S2FTError: if the folder's config is no adapter's, or no adapter's of this model.
    """
    slices = S2FTConfig.from_folder(folder).slices or {}
    return [_row(module, Slice.parse(text), model) for module, text in slices.items()]


def _row(module: str, trained: Slice, model: nn.Module) -> dict[str, Any]:
    linear = linear_at(model, module)
    if linear is None:
        raise S2FTError(f"{module} is no linear layer of the model")
    inputs, outputs = features(linear)
    head = {"module": module, "label": _short(module), "side": trained.side}
    return {**head, "size": inputs if trained.side == "in" else outputs, "channels": trained.indices.tolist()}


def _short(module: str) -> str:
    """The layer's number and the last part of its name.

    Example:
        >>> _short("model.layers.11.mlp.down_proj"), _short("lm_head")
        ('11 down_proj', 'lm_head')
    """
    layer = re.search(r"\.(\d+)\.", module)
    last = module.rpartition(".")[2]
    return f"{layer[1]} {last}" if layer else last
