"""The keys and values of a batch whose rows come and go: all rows end together, and are padded on the left.

    · · · p p p a a       "·" is padding: the attention mask leaves it out, and positions do not count it
    p p p p p a a a
    · · · · · · p p       a row that has just joined

transformers' `DynamicCache`, with whole layers for models with a sliding window too: their mask leaves out what is too far
back, and rows of different lengths can be put side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache


def joined(
    first: DynamicCache, second: DynamicCache, lengths: tuple[int, int]
) -> DynamicCache:  # rows of the first, then those of the second
    """Both as one, the shorter padded on the left with zeros; if that fails, for want of memory, the first is as it was."""
    length, (rows, _, own, _) = max(lengths), first.layers[0].keys.shape
    try:
        for mine, other in zip(first.layers, second.layers, strict=True):
            mine.keys = torch.cat([_padded(mine.keys, length), _padded(other.keys, length)])
            mine.values = torch.cat([_padded(mine.values, length), _padded(other.values, length)])
    except BaseException:
        for layer in first.layers:  # cut, not kept beside: both would take twice the memory
            layer.keys, layer.values = (part[:rows, :, -own:] for part in (layer.keys, layer.values))
        raise
    return first


def kept(
    cache: DynamicCache,
    rows: Tensor,  # [kept], int64
    start: int,  # what lies before is padding in all of them
) -> DynamicCache:
    """These rows alone, without the padding that they share."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[rows, :, start:], layer.values[rows, :, start:]
    return cache


def padded_mask(
    mask: Tensor,  # [rows, length]
    length: int,
) -> Tensor:  # [rows, length]
    """The attention mask, with padding on the left."""
    return pad(mask, (length - mask.shape[1], 0))


def _padded(
    tensor: Tensor,  # [rows, heads, length, width]
    length: int,
) -> Tensor:
    return pad(tensor, (0, 0, length - tensor.shape[2], 0))
