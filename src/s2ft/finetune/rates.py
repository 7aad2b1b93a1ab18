"""A learning rate for each slice, where one for all is not wanted (`slice_rates`).

    one         the same for all
    channels    ∝ 1 / √(channels of the slice)          the rule of `training/rate.py`, slice by slice
    inputs      ∝ 1 / √(weights that one output sums)   input side: its channels; output side: all inputs of the layer
    norm        ∝ root mean square of the base's slice  steps that are equal relative to the weights that they change

The rates' geometric mean over the slices is the run's learning rate, and the schedule scales them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from statistics import geometric_mean

from torch import Tensor, nn
from torch.optim import Optimizer

from s2ft.common.errors import S2FTError
from s2ft.layer.linear import S2FTLinear, sliced_layers
from s2ft.layer.sharding import read_matrix

ONE = "one"


def rate_factors(model: nn.Module, adapter: str, by: str) -> dict[Tensor, float]:
    """Delta → what its learning rate is multiplied by.

    Args:
        model: With the adapter, outside of `in_place`: the base must hold its own values.
        adapter: Its name.
        by: `one`, `channels`, `inputs` or `norm`.

    Raises:
        S2FTError: by norm, if a base weight is not plain, or zero in the slice.
    """
    layers = sliced_layers(model, adapter)
    wanted = [_wanted(path, layer, adapter, by) for path, layer in layers.items()]
    mean = geometric_mean(wanted)
    deltas = (layer.block(adapter).weight for layer in layers.values())
    return {delta: rate / mean for delta, rate in zip(deltas, wanted, strict=True)}


def _wanted(path: str, layer: S2FTLinear, adapter: str, by: str) -> float:
    """The slice's rate, up to a factor that is the same for all."""
    trained = layer.block(adapter).trained
    if by == "channels":
        return 1 / sqrt(len(trained.indices))
    if by == "inputs":
        return 1 / sqrt(len(trained.indices) if trained.side == "in" else layer.in_features)
    size = trained.of(read_matrix(layer.get_base_layer(), "slice_rates='norm'")).float().square().mean().sqrt().item()
    if size == 0:
        raise S2FTError(f"slice_rates='norm': the base weight of {path} is zero in the slice; choose another")
    return size


def split_groups(optimizer: Optimizer, factors: Mapping[Tensor, float], rate: float) -> None:
    """Gives each delta of `factors` a group of its own in `optimizer`, at `rate` times its factor; before the first step."""
    groups = []
    for group in optimizer.param_groups:
        others = [parameter for parameter in group["params"] if parameter not in factors]
        deltas = [parameter for parameter in group["params"] if parameter in factors]
        groups += [{**group, "params": others}] if others else []
        groups += [{**group, "params": [delta], "lr": rate * factors[delta]} for delta in deltas]
    optimizer.param_groups[:] = groups
