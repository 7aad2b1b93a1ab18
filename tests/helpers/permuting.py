"""Permutes the channels of a model by hand."""

import torch
from torch import nn

from s2ft.layer.linears import linear_layer, weight_matrix
from s2ft.selection.units import Projection, Structure


def permute_projection(model: nn.Module, projection: Projection, order: torch.Tensor) -> None:
    """Moves unit `order[i]` of the projection to place i, weights and biases."""
    layer = linear_layer(model.get_submodule(projection.module))
    grid = torch.from_numpy(projection.grid)  # [units, width]
    channels, places = grid[order].flatten(), grid.flatten()
    weight = weight_matrix(layer).data
    if projection.side == "in":
        weight[:, places] = weight[:, channels].clone()
        return
    weight[places] = weight[channels].clone()
    if layer.bias is not None:
        layer.bias.data[places] = layer.bias.data[channels].clone()


def head_order(structure: Structure) -> tuple[torch.Tensor, torch.Tensor]:
    """A random permutation of groups, and of query heads within them: (order of heads, order of groups)."""
    size = structure.units // structure.groups
    groups = torch.randperm(structure.groups)
    heads = torch.cat([group * size + torch.randperm(size) for group in groups.tolist()])
    return heads, groups
