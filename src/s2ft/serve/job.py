"""One answer to be written: what is asked of the engine, and what comes back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

FailureKind = Literal["timeout", "stopping", "adapter", "overflow", "engine"]
"""The time is over; the server is about to stop; the adapter cannot be used; its logits are not finite; all else."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: The answer's limit; 0 writes nothing (for the logprobs of a prompt).
        temperature: 0 takes the likeliest token.
        top_p: Draws from the likeliest tokens that together have this probability.
        seed: Of the request's own random numbers; whatever else is in the batch, it draws the same ones.
        top_logprobs: How many likeliest tokens are told beside each chosen one; None tells no logprobs at all.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Told:
    """A token with its log-probability, before temperature and top_p; None for the first token of a prompt."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, the likeliest first


@dataclass(frozen=True)
class Piece:
    """A part of the answer."""

    text: str
    tokens: tuple[Told, ...]  # those since the last piece


@dataclass(frozen=True)
class Prompt:
    """The prompt's own tokens with their log-probabilities; comes first, where it was asked for."""

    tokens: tuple[Told, ...]


@dataclass(frozen=True)
class End:
    """The answer is complete: at its natural end or a stop string ("stop"), or at its limit ("length")."""

    reason: str
    tokens: int  # that were generated


@dataclass(frozen=True)
class Failure:
    """There is no answer, or no more of it."""

    kind: FailureKind


Event = Piece | Prompt | End | Failure


@dataclass(eq=False)
class Job:
    """One row of a batch.

    Attributes:
        prompt: Its token ids, at least one.
        adapter: By the pool's name, or `__base__`.
        folder: Where that adapter lies; None for the base.
        stop: Texts that end the answer; they are not part of it.
        tell_prompt: Whether the prompt's own logprobs are wanted.
        index: Which of its request's answers this is.
        deadline: On the clock of `time.monotonic`.
        inbox: Whoever waits for the answer; the engine does not look inside.
        text: The prompt as the client sent it; None where it sent tokens, or a chat.
        goes_on: Whether the answer's text goes on from the prompt's, as a completion does; a message stands by itself.
        failure: Set by any thread to end it.
        is_cancelled: Set by any thread when nobody waits any more.
    """

    prompt: Sequence[int]
    adapter: str
    sampling: Sampling
    folder: Path | None = None
    stop: tuple[str, ...] = ()
    tell_prompt: bool = False
    index: int = 0
    deadline: float = float("inf")
    inbox: Any = None
    text: str | None = None
    goes_on: bool = False
    failure: FailureKind | None = field(default=None, init=False)
    is_cancelled: bool = field(default=False, init=False)

    def look(self) -> bool:
        """Whether it is to go on; notes a failure if its time is over."""
        if self.failure is None and time.monotonic() > self.deadline:
            self.failure = "timeout"
        return self.failure is None and not self.is_cancelled
