"""Rows that go through the model together, each with an adapter of its own, or none; rows join and leave at any token.

transformers has continuous batching of its own (`generate_batch`), but it lays all requests out as one row, one after the
other, and gives the model no word of which token is whose. An adapter belongs to a row of the batch (`adapter_names`); and all
requests share its one source of random numbers. Hence this small one, over `tuner/mixing.py` and `serve/cache.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from s2ft.evaluate.engines import pad_left, places_of
from s2ft.serve.cache import joined, kept, padded_mask
from s2ft.tuner.mixing import mixed_rows
from s2ft.tuner.model import S2FTModel


class Batch:
    """The rows under way. For one thread; no other may change the model meanwhile.

    Args:
        tuner: The model, with a pool that knows the adapters; in evaluation mode.
    """

    def __init__(self, tuner: S2FTModel) -> None:
        self._tuner = tuner
        self._names: list[str] = []
        self._cache: DynamicCache | None = None
        self._mask = torch.empty(0, 0, dtype=torch.int64)  # [rows, length]
        self._mixing: ExitStack | None = None  # while the rows stay, so does what the layers prepared for them

    def __len__(self) -> int:
        return len(self._names)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapter of each row."""
        return tuple(self._names)

    @torch.no_grad()
    def join(
        self,
        prompts: Sequence[Sequence[int]],
        names: Sequence[str],  # the adapter of each, or `__base__`
        whole: bool = False,
    ) -> Tensor:  # [prompts, vocabulary], float32; if `whole`, [prompts, longest, vocabulary], padded on the left
        """Adds rows: reads their prompts, and returns the logits of what comes next.

        Raises:
            S2FTError: if the pool cannot bring an adapter; the rows before are as they were.
        """
        self._pause()
        ids, mask = (part.to(self._device) for part in pad_left([list(prompt) for prompt in prompts], 0))
        cache = DynamicCache()
        with self._mixed(names):
            logits = self._forward(ids, mask, places_of(mask), cache, 0 if whole else 1)
        self._take(list(names), cache, mask)
        return logits if whole else logits[:, -1]

    @torch.no_grad()
    def step(
        self,
        tokens: Sequence[int],  # one for each row
    ) -> Tensor:  # [rows, vocabulary], float32
        """Adds a token to each row, and returns the logits of what comes next."""
        assert self._cache is not None
        if self._mixing is None:
            self._mixing = self._mixed(self._names)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self), 1)], 1)
        ids = torch.tensor(tokens, device=self._device)[:, None]
        return self._forward(ids, self._mask, self._mask.sum(-1, keepdim=True) - 1, self._cache, 1)[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        """These rows stay, in this order; the others are gone."""
        self._pause()
        self._names = [self._names[row] for row in rows]
        if not rows:
            self._cache, self._mask = None, self._mask[:0]
            return
        assert self._cache is not None
        places = torch.tensor(rows, device=self._device)
        mask = self._mask[places]
        start = int(mask.argmax(1).min())  # where the longest row begins
        self._mask, self._cache = mask[:, start:], kept(self._cache, places, start)

    def _take(self, names: list[str], cache: DynamicCache, mask: Tensor) -> None:
        if self._cache is None:
            self._names, self._cache, self._mask = names, cache, mask
            return
        lengths = (self._mask.shape[1], mask.shape[1])
        both = torch.cat([padded_mask(one, max(lengths)) for one in (self._mask, mask)])
        self._cache, self._mask = joined(self._cache, cache, lengths), both
        self._names += names

    def _forward(
        self,
        ids: Tensor,  # [rows, new]
        mask: Tensor,  # [rows, length]
        positions: Tensor,  # [rows, new]
        cache: DynamicCache,
        last: int,  # how many of the logits are wanted; 0 is all
    ) -> Tensor:  # [rows, last, vocabulary], float32
        model: Any = self._tuner.model
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last,
        )
        logits: Tensor = output.logits
        return logits.float()

    def _mixed(self, names: Sequence[str]) -> ExitStack:
        """Until it is closed, rows have these adapters."""
        with ExitStack() as stack:
            stack.enter_context(self._tuner.shared.turns.alone())
            stack.enter_context(mixed_rows(self._tuner, list(names), beams=1))
            return stack.pop_all()

    def _pause(self) -> None:
        if self._mixing is not None:
            self._mixing.close()
            self._mixing = None

    @property
    def _device(self) -> torch.device:
        model: Any = self._tuner.model
        device: torch.device = model.device
        return device
