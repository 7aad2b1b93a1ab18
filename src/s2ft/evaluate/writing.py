"""The tokens of a batch of answers. Rows that have ended leave it, so that a long answer does not keep the others at work.

    p p p │ a a a a │ a a end      a stretch: so many tokens of every row, by transformers' `generate`
    · p p │ a end                  has ended: the second stretch is one of two rows, on their keys and values
    · · p │ a a a a │ end

Caches of other kinds than keys and values cannot be taken apart by rows: such models write the rest in a second stretch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

STRETCH = 32  # tokens


@torch.no_grad()
def written(
    model: Any,  # its generation config says how tokens are chosen, and which end an answer
    tokens: Tensor,  # [prompts, longest], int64, padded on the left
    mask: Tensor,  # [prompts, longest], int64
    room: int,  # tokens that an answer may have
    ends: Collection[int],
    stretch: int,  # tokens until rows may leave; of `room`, all stay to the end, as beams must
) -> list[list[int]]:
    """The tokens after each prompt. What comes after one of `ends` means nothing."""
    found: list[list[int]] = [[] for _ in tokens]
    rows, cache = list(range(len(found))), None
    while rows and room > 0:
        output = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=min(stretch, room),
            return_dict_in_generate=True,
        )
        new = output.sequences[:, tokens.shape[1] :]  # [rows, new]
        for row, some in zip(rows, new.tolist(), strict=True):
            found[row] += some
        room -= new.shape[1]
        places = [place for place, row in enumerate(rows) if not set(ends).intersection(found[row])]
        rows, kept = [rows[place] for place in places], torch.tensor(places, dtype=torch.int64, device=tokens.device)
        tokens, mask = output.sequences[kept], torch.cat([mask, torch.ones_like(new)], 1)[kept]
        cache = _chosen(output.past_key_values, kept)
        stretch = room if cache is None else stretch
    return found


def _chosen(
    cache: Any,
    rows: Tensor,  # [kept], int64
) -> Cache | None:
    """These rows alone; None if they cannot be chosen."""
    if not has_rows(cache):
        return None
    cache.batch_select_indices(rows)
    return cache


def has_rows(cache: Any) -> TypeGuard[Cache]:
    """Whether it consists of keys and values alone, so that its rows can be chosen from, and repeated."""
    layers = getattr(cache, "layers", [])
    return len(layers) > 0 and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
