"""Rows of an embedding that an adapter trains (`trainable_token_indices`): they stand in the base weight when its slices do.

PEFT's layer for them is merged by itself, with whatever name it is given, and is unmerged for good by a pass that runs no
adapter. Here the model tells it which adapters' rows to hold, after every change of what its slices are merged into.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import nn

from s2ft.format.slices import all_finite


def peft_layers(model: nn.Module) -> Iterator[BaseTunerLayer]:
    """PEFT's layers in a model, but for token rows: what is merged layer by layer."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            yield module


def kept_by(wrapper: AuxiliaryTrainingWrapper) -> set[str]:
    """The adapters that have a copy of the module that it wraps, or rows in it."""
    found: set[str] = wrapper._adapters  # noqa: SLF001 - no public list
    return found


def hold_rows(model: nn.Module, adapters: Sequence[str]) -> None:
    """Makes the base weights hold the rows of exactly these adapters, as far as they have any."""
    for layer in _token_layers(model).values():
        _hold(layer, adapters)


def rows_anew(model: nn.Module, _: Any = None) -> None:
    """Writes rows that stand in a base weight again: their values were loaded (a hook of `load_state_dict`)."""
    with rows_aside(model):
        pass


@contextmanager
def rows_aside(model: nn.Module) -> Iterator[None]:
    """During the block, base weights have their own rows; then again those of the same adapters, if they still exist."""
    merged = [(layer, list(layer.merged_adapters)) for layer in _token_layers(model).values() if layer.merged]
    for layer, _ in merged:
        _hold(layer, ())
    try:
        yield
    finally:
        for layer, names in merged:
            _hold(layer, names)


@contextmanager
def rows_as_before(model: nn.Module) -> Iterator[None]:
    """If the block raises, the base weights hold the rows that they held before."""
    before = [(layer, list(layer.merged_adapters)) for layer in _token_layers(model).values()]
    try:
        yield
    except BaseException:
        for layer, names in before:
            _hold(layer, names)
        raise


def broken_rows(model: nn.Module, adapters: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Where rows of these adapters are not finite in the dtype of the base weight, and PEFT's words for it."""
    for path, layer in _token_layers(model).items():
        with onload_layer(layer):
            rows = {name: layer.trainable_tokens_delta[name] for name in adapters if name in layer.token_indices}
            broken = [name for name, delta in rows.items() if not all_finite(delta.detach().to(layer.weight.dtype))]
        if broken:
            yield path, f"NaNs detected in the merged weights. The adapter {broken[0]} seems to be broken"


def deactivate_idle_rows(model: nn.Module) -> None:
    """Deactivates rows of a module that no active adapter has rows in; PEFT activates some when it deletes an adapter."""
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper) and not module.active_adapters:
            module.set_adapter([])


def _token_layers(model: nn.Module) -> dict[str, TrainableTokensLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, TrainableTokensLayer)}


def _hold(layer: TrainableTokensLayer, adapters: Sequence[str]) -> None:
    names = [name for name in adapters if name in layer.token_indices]
    if layer.merged_adapters == names:
        return
    with onload_layer(layer):
        if layer.merged:
            layer.unmerge()
        if names:
            layer.merge(adapter_names=names)
