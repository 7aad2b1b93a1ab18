"""One answer in the making: from tokens to events."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from s2ft.serve.job import End, Event, Job, Piece, Prompt, Told
from s2ft.serve.sampling import tell
from s2ft.serve.text import Text


class Row:
    """A job that runs.

    Args:
        job: The job.
        tokenizer: Of its model.
        ends: Tokens that end an answer; they have no text, and count as generated.
    """

    def __init__(self, job: Job, tokenizer: object, ends: Collection[int]) -> None:
        self.job, self.token = job, 0  # the token that goes into the model next
        self.generator = torch.Generator().manual_seed(job.sampling.seed)
        self._ends, self._text = ends, Text(tokenizer, job.stop, job.prompt if job.goes_on else ())
        self._count, self._untold = 0, list[Told]()
        self.is_complete = job.sampling.max_tokens == 0

    def start(
        self,
        logits: Tensor | None,  # [length, vocabulary], of the prompt, if its logprobs are wanted
    ) -> list[Event]:
        """What is told before the first token."""
        events: list[Event] = [] if logits is None else [Prompt(self._of_prompt(logits))]
        return [*events, End("length", 0)] if self.is_complete else events

    def add(self, told: Told) -> list[Event]:
        """What is told after one more token."""
        self.token, self._count = told.token, self._count + 1
        self._untold.append(told)
        at_end = told.token in self._ends
        text = "" if at_end else self._text.add(told.token)
        at_limit = self._count == self.job.sampling.max_tokens
        if (at_end or at_limit) and not self._text.is_stopped:
            text += self._text.end()
        self.is_complete = at_end or at_limit or self._text.is_stopped
        if not self.is_complete:
            return self._piece(text) if text else []
        return [*self._piece(text), End("stop" if at_end or self._text.is_stopped else "length", self._count)]

    def _piece(self, text: str) -> list[Event]:
        tokens, self._untold = tuple(self._untold), []
        return [Piece(text, tokens)]

    def _of_prompt(self, logits: Tensor) -> tuple[Told, ...]:
        prompt: Sequence[int] = self.job.prompt
        return (Told(prompt[0]), *tell(logits[:-1], prompt[1:], self.job.sampling.top_logprobs or 0))
