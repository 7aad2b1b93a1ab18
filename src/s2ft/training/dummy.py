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


def dummy_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments for `model(**arguments)`; random ones are the same each time, and no random numbers are used up."""
    names = inspect.signature(model.forward).parameters
    if "grid_thw" in names:
        found = _patches(model)
    elif model.main_input_name in ("input_ids", "decoder_input_ids") and "input_ids" in names:
        found = {name: value for name, value in model.dummy_inputs.items() if isinstance(value, Tensor)}
    else:
        found = {model.main_input_name: _random(model, *_shape(model))}
    if "use_cache" in names:
        found["use_cache"] = False  # a cache would be filled again by a second call
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in found.items()}


def parts(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """The models that `model` is made of, with their paths, outer ones first."""
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            yield path, module


def _shape(model: PreTrainedModel) -> tuple[int, ...]:
    """Of the model's main input, for a batch of one."""
    config = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or getattr(config, "vision_config", config).image_size
        height, width = (size, size) if isinstance(size, int) else size
        return 1, getattr(config, "num_channels", 3), height, width
    if model.main_input_name == "input_features":
        positions: int | None = getattr(config, "max_source_positions", None)
        return 1, config.num_mel_bins, 2 * positions if positions else _FRAMES
    return 1, _SAMPLES


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
