"""Merging on a live model: what is refused before anything changes, and what a quantised model is merged as.

slices               each layer adds its own to its weight (`layer/adapted.py`)
token rows           follow the slices (`layer/token_rows.py`)
modules kept whole   cannot be merged: the active adapter's is what runs
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from s2ft.common.errors import S2FTError, raise_by_place, raise_together
from s2ft.format.slices import all_finite
from s2ft.layer.adapted import AdaptedLayer, not_loaded, require_own
from s2ft.layer.columns import add_delta, put_slice, take_slice
from s2ft.layer.dequantise import dequantise, quantised_layers, values_of
from s2ft.layer.linears import is_quantised, weight_of
from s2ft.layer.sharding import gathered
from s2ft.layer.token_rows import broken_rows, kept_by


def refuse_merging(
    model: nn.Module,
    layers: Sequence[AdaptedLayer],
    names: Sequence[str],
    loaded: Collection[str],
    safe_merge: bool,
) -> None:
    """Raises `S2FTError` where these adapters cannot be merged.

    Args:
        model: The base model.
        layers: Its layers with slices.
        names: The adapters.
        loaded: All adapters of the model.
        safe_merge: Refuse token rows that are not finite; each layer checks its slices.
    """
    require_own(model, "merging", allowed=["merged"])
    if isinstance(names, str):
        raise S2FTError(f"adapter_names={names!r} is one name; give a list of names")
    raise_together(not_loaded(names, loaded))
    raise_together(_running_instead(model, {*names, *(name for layer in layers for name in layer.merged_adapters)}))
    paths = {layer: path for path, layer in model.named_modules()}
    problems = ((paths[layer], layer.why_unwritable(names)) for layer in layers)
    raise_by_place((path, problem) for path, problem in problems if problem)
    raise_by_place(broken_rows(model, names) if safe_merge else ())


def _running_instead(model: nn.Module, names: Collection[str]) -> Iterator[str]:
    """Of what is kept beside the slices, the active adapter's runs, so that must be one of `names`.

    Rows of several adapters can stand in the weight together, as long as one of these is active.
    """
    for path, wrapper in model.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            is_whole = isinstance(wrapper, ModulesToSaveWrapper)
            meant, active = kept_by(wrapper) & {*names}, kept_by(wrapper) & {*wrapper.active_adapters}
            other = sorted(active - meant or (meant - active if is_whole or not active else ()))
            how = "kept whole by" if is_whole else "trained in some rows by"
            if other:
                yield (
                    f"{path} is {how} the adapter {other[0]!r}, and the active adapter's is what runs: "
                    "make the adapters active that are to be merged (`set_adapter`)"
                )


def make_plain(model: nn.Module, layers: Sequence[AdaptedLayer], names: Sequence[str], safe_merge: bool) -> None:
    """Dequantises a quantised model, so that it can be merged for good; its adapters stand beside the weights no longer.

    Raises:
        S2FTError: and nothing has changed, if a weight cannot be read, or (with `safe_merge`) the result is not finite.
    """
    if not quantised_layers(model):
        return
    dtype = getattr(model, "dtype", torch.float32)
    if safe_merge:
        raise_together(_not_finite(layers, names, dtype))
    for layer in layers:
        layer.take_out()
    try:
        dequantise(model, dtype)
    finally:
        for layer in layers:
            layer.settle()


def _not_finite(layers: Sequence[AdaptedLayer], names: Sequence[str], dtype: torch.dtype) -> Iterator[str]:
    """Each layer finds this out when it merges, by then on plain weights."""
    for layer in layers:
        linear: Any = layer.get_base_layer()
        held = [name for name in dict.fromkeys([*layer.merged_adapters, *names]) if name in layer.s2ft_block]
        if held and not weight_of(linear).is_meta:
            matrix = values_of(linear)
            matrix = matrix.to(dtype if is_quantised(linear) else matrix.dtype, copy=True)
            broken = [name for name in held if not _adds_up(layer, name, matrix)]
            yield from (
                f"NaNs detected in the merged weights. The adapter {name} seems to be broken" for name in broken
            )


@torch.no_grad()
def _adds_up(
    layer: AdaptedLayer,
    name: str,
    matrix: Tensor,  # [out_features, in_features], changed in place
) -> bool:
    """Whether the adapter's channels are finite once its slice is added to them."""
    block = layer.block(name)
    channels, delta = block.indices.to(matrix.device), gathered(block.weight).to(matrix.device)
    values = add_delta(take_slice(matrix, block.dim, channels), delta)
    put_slice(matrix, block.dim, channels, values)
    return all_finite(values)
