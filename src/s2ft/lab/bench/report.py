"""What benchmarks share: contestants take turns; environment, settings and rows come back."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from s2ft.common.errors import S2FTError
from s2ft.runtime.environment import environment

LEAST = 3  # rounds are measured, however long they take


@dataclass(frozen=True)
class Report:
    """A benchmark's result; `as_dict` is what `--json` writes."""

    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    environment: dict[str, Any] = field(default_factory=environment)

    def as_dict(self) -> dict[str, Any]:
        """Environment, settings and rows."""
        return {"environment": self.environment, "settings": self.settings, "rows": self.rows}


def measured_devices(wanted: str | None) -> list[str]:
    """The device that is asked for; else the CPU and, where there is one, the GPU.

    Raises:
        S2FTError: if it is a GPU, and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise S2FTError("device='cuda': there is no CUDA GPU here; take device='cpu'")
    return [str(wanted)] if wanted else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def take_turns(
    names: Collection[str], measure: Callable[[str], float], rounds: int, seconds: float, warm_up: int
) -> dict[str, list[float]]:
    """Measures each name once a round, in an order that is drawn anew, so that a machine that slows down slows all.

    Args:
        names: What is measured.
        measure: Name → a time.
        rounds: The most that are measured, after `warm_up` others.
        seconds: No further round begins after so long, once `LEAST` were measured.
        warm_up: Rounds whose times are dropped.

    Example:
        >>> take_turns(["a", "b"], len, rounds=3, seconds=60, warm_up=1)
        {'a': [1, 1, 1], 'b': [1, 1, 1]}
    """
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for number in range(warm_up + rounds):
        for name in random.sample(list(names), len(names)):
            taken = measure(name)
            if number >= warm_up:
                times[name].append(taken)
        if number + 1 >= warm_up + LEAST and time.perf_counter() > end:
            break
    return times


def model_label(model: str) -> str:
    """A model's name in the rows: of a path its end, so that no report says where it lies."""
    return Path(model).resolve().name if Path(model).exists() else model
