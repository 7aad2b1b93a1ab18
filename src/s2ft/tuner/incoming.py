"""What is about to be loaded into an adapter of a live model: compared with what the model holds, before a value is written.

PEFT puts an adapter in first and reads its weights afterwards, by whatever names the file has. Here names, shapes and values
are checked, and only the adapter's own tensors let through: never the base model's weights. Channels that a config left open
become those that are loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from s2ft.adapters.compatibility import digest_anew
from s2ft.common.errors import raise_together
from s2ft.common.reading import shown
from s2ft.format.config import S2FTConfig
from s2ft.format.names import bare, is_base_copy, part_name
from s2ft.format.slices import all_finite
from s2ft.format.validation import DELTA_DTYPES
from s2ft.format.weight_file import Header
from s2ft.layer.linear import S2FTLinear, sliced_layers


def check_and_adopt(model: nn.Module, config: S2FTConfig, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Checks all that is to be loaded into an adapter; `config` and `model` take its channels where they were left open.

    Args:
        tensors: By their names in an adapter file, or by PEFT's names of modules to save and token rows.

    Raises:
        S2FTError: with every problem, before anything is changed.
    """
    layers = {_path(name): layer for name, layer in sliced_layers(model, adapter_name).items()}
    auxiliaries = [*_auxiliaries(model, adapter_name)]
    expected = _slice_tensors(layers, adapter_name)
    expected |= {f"{_path(name)}.{saved}": module.state_dict()[held] for name, module, saved, held in auxiliaries}
    aliases = {f"{_path(name)}.{held}": f"{_path(name)}.{saved}" for name, _, saved, held in auxiliaries}
    given = {
        aliases.get(bare(name), bare(name)): tensor
        for name, tensor in tensors.items()
        if not is_base_copy(name, config.slices)
    }
    raise_together(_name_problems(expected, given))
    raise_together(_not_finite(given))
    warn_of_overflow({layer: given[part_name(path, "weight")] for path, layer in layers.items()})
    if _take_channels(config, adapter_name, layers, {path: given[part_name(path, "indices")] for path in layers}):
        digest_anew(model.get_base_model() if isinstance(model, PeftModel) else model, config)


def check_and_adopt_state(
    tuner: nn.Module, configs: Mapping[str, S2FTConfig], state: Mapping[str, Tensor], prefix: str
) -> None:
    """The same for torch's own `load_state_dict`, of whatever slices a state has; `prefix` is the tuner's in it."""
    base = tuner.model
    assert isinstance(base, nn.Module)
    for adapter_name, config in configs.items():
        layers = sliced_layers(base, adapter_name)
        names = {name: f"{prefix}model.{part_name(name, adapter_name)}." for name in layers}
        held = {f"{names[name]}weight": layer.block(adapter_name).weight for name, layer in layers.items()}
        given = {name: state[name] for name in held if name in state}
        raise_together(_name_problems({name: held[name] for name in given}, given))
        raise_together(_not_finite(given))
        indices = {_path(name): state[f"{start}indices"] for name, start in names.items() if f"{start}indices" in state}
        if _take_channels(config, adapter_name, {_path(name): layer for name, layer in layers.items()}, indices):
            digest_anew(base, config)


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


def auxiliary_tensors(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT saves of an adapter beside its slices (modules to save, token rows), by the names in a file."""
    names = auxiliary_names(model, adapter_name)
    return {saved: state_dict[held] for held, saved in names.items() if held in state_dict}


def auxiliary_names(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """The names of those tensors in a state of the model → in a file."""
    found = {}
    for name, _, saved, held in _auxiliaries(model, adapter_name):
        path = name.removeprefix("_fsdp_wrapped_module.")  # as PEFT does
        found[f"{path}.{held}"] = f"{path}.{saved}"
    return found


def warn_of_overflow(deltas: Mapping[Any, Tensor]) -> None:  # layer → [out_features, s] or [s, in_features]
    """Warns of deltas that the dtype of their base layer cannot hold, or add up."""
    for layer, delta in deltas.items():
        base: Any = layer.get_base_layer() if isinstance(layer, S2FTLinear) else layer
        dtype: torch.dtype = base.weight.dtype
        if delta.is_meta or not dtype.is_floating_point or not delta.numel():
            continue
        largest = float(delta.detach().abs().amax())
        if largest * min(delta.shape) > torch.finfo(dtype).max:
            warnings.warn(
                f"the adapter changes weights by up to {largest:.3g}, which the base's {dtype} cannot add up: expect outputs "
                "that are not finite",
                stacklevel=3,
            )
            return


def _slice_tensors(layers: Mapping[str, S2FTLinear], adapter_name: str) -> dict[str, Tensor]:
    """An adapter's own tensors in the model, by their bare names in a file."""
    return {
        part_name(path, part): getattr(layer.block(adapter_name), part)
        for path, layer in layers.items()
        for part in ("weight", "indices")
    }


def _auxiliaries(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, AuxiliaryTrainingWrapper, str, str]]:
    """PEFT's modules beside the slices: each one's path and itself, a tensor's name in a file and in the module."""
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for saved, held in module.adapter_state_dict_load_map(adapter_name).items():
                yield name, module, saved, held


def _path(name: str) -> str:
    """A module's path as the base model has it: without PEFT's, FSDP's and torch.compile's additions."""
    return bare(name.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", ""))


def _name_problems(expected: Mapping[str, Tensor], given: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{name} is missing, which the adapter consists of" for name in expected if name not in given)
    for name, tensor in given.items():
        if name not in expected:
            yield (
                f"{shown(name)} is no part of the adapter: neither a slice nor what its config declares (modules_to_save, "
                "trainable_token_indices). It would overwrite the base model"
            )
            continue
        ours, theirs = Header.of(expected[name]), Header.of(tensor)
        if ours.shape != theirs.shape:
            yield f"{name} has shape {list(theirs.shape)}; in the model it is {list(ours.shape)}"
        elif _kind(ours.dtype) != _kind(theirs.dtype):
            yield f"{name} is {theirs}; in the model it is {ours.dtype}"


def _kind(dtype: str) -> str:
    return "real" if dtype in DELTA_DTYPES else dtype


def _not_finite(given: Mapping[str, Tensor]) -> Iterator[str]:
    for name, tensor in given.items():
        if tensor.is_floating_point() and not tensor.is_meta and not all_finite(tensor):
            yield f"{name} holds values that are not finite"


def _take_channels(
    config: S2FTConfig, adapter_name: str, layers: Mapping[str, S2FTLinear], indices: Mapping[str, Tensor]
) -> bool:
    """Gives an adapter the channels of a file, where its config left them open; whether any changed.

    Raises:
        S2FTError: before any is changed, if they differ from those of the config, or are none of the layer's.
    """
    differing = {path: found for path, found in indices.items() if not _holds(layers[path], adapter_name, found)}
    problems = (_channel_problem(config, path, layers[path], adapter_name, found) for path, found in differing.items())
    raise_together(filter(None, problems))
    for path, found in differing.items():
        layers[path].choose(adapter_name, found.cpu().numpy())
    if differing:
        config.adopt({path: str(layers[path].block(adapter_name).trained) for path in differing})
    return bool(differing)


def _holds(layer: S2FTLinear, adapter_name: str, indices: Tensor) -> bool:
    own = torch.from_numpy(layer.block(adapter_name).trained.indices)
    return indices.is_meta or torch.equal(indices.cpu(), own)


def _channel_problem(
    config: S2FTConfig, path: str, layer: S2FTLinear, adapter_name: str, indices: Tensor
) -> str | None:
    block, found, name = layer.block(adapter_name), indices.cpu(), part_name(path, "indices")
    if not config.left_open("slices"):
        return f"{name} differ from the slice {shown(str(block.trained))} in the adapter's config"
    size = layer.in_features if block.side == "in" else layer.out_features
    sound = found.dtype == torch.int64 and found.shape == block.indices.shape and bool((found.diff() > 0).all())
    if sound and int(found[0]) >= 0 and int(found[-1]) < size:
        return None
    return f"{name} are no {block.indices.numel()} ascending channels of the {size} of its {block.side}put side"
