"""How long a run will take and how much memory, from the trial of one batch.

    time      steps × batches a step × time of the trial's batch × (mean tokens of a batch / the trial's)
    memory    held before + gradients and Adam's two moments + activations × (most tokens of a batch / the trial's)

Held-out measurements and checkpoints are not counted. On a CPU, activations are what is kept for backward.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import nn

from s2ft.finetune.trial import Trial, trained_bytes
from s2ft.runtime.timing import free_bytes

BESIDE_WEIGHTS = 3  # × what is trained: its gradient and Adam's two moments


@dataclass(frozen=True)
class Estimate:
    """Of the steps that are left. Memory is in bytes."""

    steps: int
    step_seconds: float
    held: int  # now: weights, libraries, data
    trained: int  # for gradients and optimizer
    activations: int
    free: int

    @property
    def time(self) -> str:
        """In words."""
        steps = f"{self.steps:,} {'step' if self.steps == 1 else 'steps'} of {_in_words(self.step_seconds)}"
        return f"about {_in_words(self.steps * self.step_seconds)}: {steps}"

    @property
    def memory(self) -> str:
        """In words."""
        more = f"{_size(self.trained)} for gradients and optimizer, {_size(self.activations)} for activations"
        return f"about {_size(self.held + self.needed)}: {_size(self.held)} held, {more}; {_size(self.free)} are free"

    @property
    def needed(self) -> int:
        """More than is held now."""
        return self.trained + self.activations

    @property
    def lack(self) -> str | None:
        """A warning if it will not fit."""
        if self.needed <= self.free:
            return None
        return f"training needs about {_size(self.needed)} of memory, but {_size(self.free)} are free"

    @property
    def card(self) -> dict[str, Any]:
        """For the run card, beside what was measured."""
        seconds = round(self.steps * self.step_seconds, 3)
        return {"estimated_seconds": seconds, "estimated_memory_bytes": self.held + self.needed}


def estimate(
    trial: Trial, model: nn.Module, lengths: Sequence[int], batch_size: int, batches: int, steps: int
) -> Estimate:
    """The estimate for a run.

    Args:
        trial: Of a batch of the run.
        model: What is trained.
        lengths: Tokens of each row that the loader draws from.
        batch_size: Rows of a batch.
        batches: Of a step.
        steps: That are left.
    """
    mean, most = padded_tokens(lengths, batch_size)
    return Estimate(
        steps=steps,
        step_seconds=batches * trial.milliseconds / 1e3 * mean / trial.tokens,
        held=trial.held,
        trained=BESIDE_WEIGHTS * trained_bytes(model),
        activations=round(trial.kept * most / trial.tokens),
        free=free_bytes(next(model.parameters()).device.type),
    )


def padded_tokens(lengths: Sequence[int], batch_size: int) -> tuple[float, int]:
    """Tokens of a batch, padding included: the mean over batches in random order, and the most there can be.

    Example:
        >>> padded_tokens([5, 5, 5, 5], batch_size=2)
        (10.0, 10)
    """
    drawn = random.Random(0).sample(lengths, len(lengths))
    batches = [drawn[start : start + batch_size] for start in range(0, len(drawn), batch_size)]
    return fmean(len(batch) * max(batch) for batch in batches), batch_size * max(lengths)


def _size(count: int) -> str:
    """Bytes in words.

    Example:
        >>> _size(3_140_000_000), _size(700_000)
        ('3.1 GB', '1 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{math.ceil(count / 1e6)} MB"


def _in_words(seconds: float) -> str:
    """Two digits or so.

    Example:
        >>> [_in_words(seconds) for seconds in (0.0312, 4.81, 72.2, 700, 12_000, 90_000)]
        ['0.031 s', '4.8 s', '72 s', '12 min', '3.3 h', '25 h']
    """
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{_two_digits(seconds / size)} {unit}"
    return f"{_two_digits(seconds)} s"


def _two_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"
