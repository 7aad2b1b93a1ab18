"""What a model, or one of its parts, is called with to see what it computes: text, images, sound or patches.

transformers gives every model tokens as `dummy_inputs`, whatever it reads. Here the arguments of its `forward` decide, by
the names that all model code shares; images and sound are random, of the sizes that the config names.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_FRAMES = 64  # of sound, where the config does not say
_SAMPLES = 4000  # of a wave
_SIDE = 64  # of an image, where the config does not say
_SENSES = ("pixel_values", "input_values", "input_features")
_PARTS = ("vision_config", "audio_config", "encoder", "encoder_config")  # configs of what sees or hears


def dummy_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments for `model(**arguments)`; random ones are the same each time, and no random numbers are used up."""
    names = inspect.signature(model.forward).parameters
    main = main_input(model)
    if "grid_thw" in names:
        found = _patches(model)
    elif main == "input_ids":
        found = {name: value for name, value in model.dummy_inputs.items() if isinstance(value, Tensor)}
    else:
        found = {main: _random(model, *_shape(model, main))}
    if "decoder_input_ids" in names and (model.config.is_encoder_decoder or main != "input_ids"):
        found.setdefault("decoder_input_ids", torch.tensor([[1, 2, 3]]).repeat(len(next(iter(found.values()))), 1))
    if "use_cache" in names:
        found["use_cache"] = False  # a cache would be filled again by a second call
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in found.items()}


def main_input(model: PreTrainedModel) -> str:
    """The argument that says what the model reads: text, if it can, unless it says otherwise."""
    names = inspect.signature(model.forward).parameters
    said: str = model.main_input_name
    if said in _SENSES and said in names:
        return said
    return next((name for name in ("input_ids", *_SENSES) if name in names), said)


def parts(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """The models that `model` is made of, with their paths, outer ones first."""
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            yield path, module


def _shape(model: PreTrainedModel, main: str) -> tuple[int, ...]:
    """Of the model's main input, for a batch of one."""
    if main == "pixel_values":
        size = _size(model, "image_size") or _SIDE
        height, width = (size, size) if isinstance(size, int) else size
        return 1, _size(model, "num_channels") or 3, height, width
    if main == "input_features":
        if bins := _size(model, "num_mel_bins"):
            positions = _size(model, "max_source_positions")
            return 1, bins, 2 * positions if positions else _FRAMES
        per_channel = _size(model, "input_feat_per_channel")
        width = (
            per_channel * _size(model, "input_channels")
            if per_channel
            else _size(model, "feature_projection_input_dim")
        )
        return 1, _FRAMES, width
    return 1, _SAMPLES


def _size(model: PreTrainedModel, name: str) -> Any:
    """A size by the model's config, or by that of its part which sees or hears; None if neither has it."""
    configs = (model.config, *(getattr(model.config, part, None) for part in _PARTS))
    return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)


def _patches(model: PreTrainedModel) -> dict[str, Any]:
    """An image cut into rows of pixels, as the towers of Qwen-VL read it."""
    config = model.config
    side = 2 * getattr(config, "spatial_merge_size", 2)
    channels: int = getattr(config, "in_channels", 0) or getattr(config, "in_chans", 3)
    pixels: int = channels * getattr(config, "temporal_patch_size", 1) * config.patch_size**2
    grid = torch.tensor([[1, side, side]])
    first = next(iter(inspect.signature(model.forward).parameters))
    return {first: _random(model, side * side, pixels), "grid_thw": grid}


def _random(model: PreTrainedModel, *shape: int) -> Tensor:
    """From a generator of its own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(model.dtype)
