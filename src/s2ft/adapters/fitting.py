"""Does an adapter fit a model: are its layers there, of its sizes, and the base weights those that it was made for?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor, nn

from s2ft.adapters.loading import check_incoming, check_state
from s2ft.common.errors import raise_together
from s2ft.format.config import S2FTConfig
from s2ft.format.digest import check_base, digest_parts, join_digests, slice_digest
from s2ft.format.names import bare, is_base_copy
from s2ft.format.slices import Runs, Slice
from s2ft.layer.dequantise import dequantised, grid
from s2ft.layer.linears import features, is_plain, linear_layer, weight_matrix
from s2ft.selection.select import select


def check_fits(model: nn.Module, config: S2FTConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `S2FTError` unless an adapter's slices are of layers of this model, and of the base they were made for.

    Args:
        shapes: Module → shape of its delta: both dimensions must be the layer's.
    """
    _check_modules(model, config, shapes)
    check_base(config.base_digest or {}, _base_digests(model, config), config.base_model_name_or_path)


def foreign_base(model: nn.Module, config: S2FTConfig, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Base weights in a file that differ from the model's, for a loader that writes all that a file has."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        # On meta the loader asks by names and shapes, and leaves it out
        if tensor.is_meta or not is_base_copy(name, config.slices):
            continue
        own = parameters.get(bare(name))
        if own is None or own.shape != tensor.shape or not torch.equal(own.cpu(), tensor.to("cpu", own.dtype)):
            yield f"{name} is not the model's own; load the adapter by PEFT, which leaves it out"


def check_and_adopt(model: nn.Module, config: S2FTConfig, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """As `check_incoming`; the digests follow the channels."""
    if check_incoming(model, config, adapter_name, tensors):
        _digest_anew(model.get_base_model() if isinstance(model, PeftModel) else model, config)


def check_and_adopt_state(
    tuner: nn.Module, configs: Mapping[str, S2FTConfig], state: Mapping[str, Tensor], prefix: str
) -> None:
    """The same for torch's own `load_state_dict`, of whatever slices a state has; `prefix` is the tuner's in it."""
    for adapter_name, config in configs.items():
        if check_state(tuner, config, adapter_name, state, prefix):
            _digest_anew(tuner.model, config)  # type: ignore[arg-type]


def _digest_anew(base: nn.Module, config: S2FTConfig) -> None:
    if config.left_open("base_digest"):
        known = _base_digests(base, replace(config, base_digest=None))
        config.base_digest = {path: digest for path, digest in known.items() if digest is not None} or None


def resolved(model: nn.Module, config: S2FTConfig) -> S2FTConfig:
    """A copy of `config` with its channels chosen and its base checked."""
    config = select(model, config).config
    _check_modules(model, config)
    digests = _base_digests(model, config)
    check_base(config.base_digest or {}, digests, config.base_model_name_or_path)
    if config.base_digest is not None:
        return config
    known = {path: digest for path, digest in digests.items() if digest is not None}
    return replace(config, base_digest=known or None)


def _check_modules(model: nn.Module, config: S2FTConfig, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
    """Every module that a slice names is there, is linear, and has the slice's channels and the delta's width."""
    modules = dict(model.named_modules())
    raise_together(
        problem
        for path, text in (config.slices or {}).items()
        if (problem := _slice_problem(modules.get(path), path, Runs.parse(text), (shapes or {}).get(path)))
    )


def _slice_problem(module: nn.Module | None, path: str, runs: Runs, shape: tuple[int, ...] | None) -> str | None:
    linear = None if module is None else linear_layer(module)
    if linear is None:
        return f"the adapter changes {path}, which is no linear layer of this model"
    inputs, outputs = features(linear)
    size, across = (inputs, outputs) if runs.side == "in" else (outputs, inputs)
    if runs.last >= size:
        return f"the adapter changes channel {runs.last} of {path}, whose {runs.side}put side has {size} channels"
    expected = (across, runs.count) if runs.side == "in" else (runs.count, across)
    if shape is not None and tuple(shape) != expected:
        return f"the adapter's delta of {path} has shape {list(shape)}; for this model it is {list(expected)}"
    return None


def _base_digests(model: nn.Module, config: S2FTConfig) -> dict[str, str | None]:
    """Module → digest of the base slice that the config's slice changes; None where it has no plain values."""
    digests: dict[str, str | None] = {}
    for path, text in (config.slices or {}).items():
        module = model.get_submodule(path)
        linear = linear_layer(module)
        assert linear is not None
        whole = Slice.parse(text)
        parts = digest_parts((config.base_digest or {}).get(path, ""), whole)
        found = {part: _digest(linear, Slice.parse(part)) for part in parts}
        digests[path] = join_digests(found, whole)
    return digests


def _digest(linear: nn.Module, chosen: Slice) -> str | None:
    plain = is_plain(linear)
    weight = weight_matrix(linear) if plain else dequantised(linear)
    if weight is None or weight.is_meta:
        return None
    indices = torch.from_numpy(chosen.indices).to(weight.device)
    part = weight.index_select(1 if chosen.side == "in" else 0, indices)
    return slice_digest(part, None if plain else grid(linear))
