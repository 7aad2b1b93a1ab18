"""Answers by transformers: prompts of like length share a batch, padded on the left, with a key-value cache.

    · · · p p p p │ a a a end            positions and attention skip the padding "·", so an answer
    p p p p p p p │ a a a a a end        does not depend on who else is in the batch, but for rounding

The longest prompts come first: a lack of memory shows at once, and the estimate of the time left errs on the long side. Batches
are made of all prompts, those that are done already included, so that an interrupted run goes on in the same batches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from s2ft.evaluate.engines import Answer, end_ids, rescued
from s2ft.evaluate.tasks import Decoding
from s2ft.runtime.models import positions


class TransformersEngine:
    """A causal language model in this process, a PEFT model too.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        batch_size: Prompts that go through the model at once.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8) -> None:
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._ends = end_ids(self._base, tokenizer)
        self._longest = positions(self._base)

    def answers(
        self, prompts: Sequence[list[int]], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[list[tuple[int, Answer]]]:
        """Batches of (index of the prompt, its answer), longest prompts first.

        A prompt that leaves no room for an answer within the model's positions gets an error; one that leaves less than
        `decoding.max_new_tokens` gets what room there is.
        """
        rooms = [self._room(len(ids), decoding) for ids in prompts]
        for batch in batches([len(ids) for ids in prompts], rooms, self._batch_size):
            if not set(batch) <= set(done):
                found = zip(
                    batch, self._batch([prompts[index] for index in batch], rooms[batch[0]], decoding), strict=True
                )
                yield [(index, answer) for index, answer in found if index not in done]

    def _room(self, length: int, decoding: Decoding) -> int:
        """How many tokens the answer to a prompt of `length` may have."""
        wanted = decoding.max_new_tokens
        return wanted if self._longest is None else max(0, min(wanted, self._longest - length))

    def _batch(self, prompts: list[list[int]], room: int, decoding: Decoding) -> list[Answer]:
        if not room:
            text = "the prompt has {} tokens; the model has room for {}, answer included"
            return [Answer(None, error=text.format(len(ids), self._longest)) for ids in prompts]
        return rescued(lambda some: self._generate(some, room, decoding.beams), prompts)

    def _generate(self, prompts: list[list[int]], room: int, beams: int) -> list[Answer]:
        pad = self._tokenizer.pad_token_id
        pad = (self._ends or [0])[0] if pad is None else pad
        tokens, mask = _pad_left(prompts, pad)
        settings = GenerationConfig(
            max_new_tokens=room, num_beams=beams, do_sample=False, pad_token_id=pad, eos_token_id=self._ends or None
        )
        with _only(self._base, settings), _evaluating(self._model), torch.no_grad():
            output = self._model.generate(
                input_ids=tokens.to(self._model.device), attention_mask=mask.to(self._model.device)
            )  # [prompts, longest + new]
        return [self._answer(row) for row in output[:, tokens.shape[1] :].tolist()]

    def _answer(self, new: list[int]) -> Answer:
        end = next((place for place, token in enumerate(new) if token in self._ends), None)
        return Answer(self._tokenizer.decode(new[:end], skip_special_tokens=True), truncated=end is None)


def batches(lengths: Sequence[int], rooms: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches, longest first; all of a batch have the same room for an answer.

    Example:
        >>> batches([5, 9, 6, 1], [8, 3, 8, 8], batch_size=2)
        [[1], [2, 0], [3]]
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    found = []
    for _, group in groupby(order, key=lambda index: rooms[index]):
        alike = list(group)
        found += [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]
    return found


def _pad_left(
    rows: Sequence[list[int]],  # token ids, of several lengths
    pad: int,
) -> tuple[Tensor, Tensor]:  # tokens and mask, [rows, longest] each
    longest = max(map(len, rows))
    tokens = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


@contextmanager
def _only(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Generates by `settings` and nothing else: a model's own (a repetition penalty, say) would not be the protocol."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout; afterwards the model is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
