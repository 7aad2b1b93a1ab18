"""What a study returns: rows (one score each), their means with intervals, and a table.

rows      method or strategy, task, seed, score
summary   method or strategy, task, mean, low, high, seeds
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2ft.lab.study.summary import Row, summarize
from s2ft.runtime.environment import environment

LOSS, HELD_OUT, PERPLEXITY = "training loss", "held-out loss", "perplexity"
PLAIN = {LOSS: ".3f", HELD_OUT: ".3f", PERPLEXITY: ".2f"}  # what is no accuracy, and how it is shown


@dataclass(frozen=True)
class StudyReport:
    """A study's result; `as_dict` is what `--json` writes."""

    settings: dict[str, Any]
    rows: list[Row]
    by: tuple[str, ...]  # the columns that name what is compared, such as ("strategy",)
    shown: tuple[str, ...] = ()  # the tasks in table and picture; all unless given
    environment: dict[str, Any] = field(default_factory=environment)
    picture: Callable[[StudyReport, Path], None] | None = None  # `bars.bars` unless given

    @property
    def summary(self) -> list[Row]:
        """Means and intervals over the seeds."""
        return summarize(self.rows, (*self.by, "task"))

    def as_dict(self) -> dict[str, Any]:
        """Environment, settings, rows and summary."""
        parts = {"environment": self.environment, "settings": self.settings}
        return {**parts, "rows": self.rows, "summary": self.summary}

    def table(self) -> list[dict[str, str]]:
        """One row for each contender, one column for each task."""
        cells: dict[str, dict[str, str]] = {}
        for row in self.summary:
            shown = cell(row, self.settings.get("measured")) + self._missing(row["seeds"])
            cells.setdefault(self.label(row), {})[row["task"]] = shown
        tasks = self.tasks
        return [
            {" / ".join(self.by): name, **{task: own.get(task, "–") for task in tasks}} for name, own in cells.items()
        ]

    def _missing(self, seeds: int) -> str:
        """Says where fewer seeds than the others' are left, because some diverged, or were not run."""
        wanted = self.settings.get("seeds")
        return f" ({seeds} of {wanted})" if isinstance(wanted, int) and seeds < wanted else ""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks in table and picture."""
        return self.shown or tuple(dict.fromkeys(row["task"] for row in self.rows))

    def label(self, row: Row) -> str:
        """What is compared, in words."""
        return ", ".join(str(row[name]) for name in self.by)


def cell(row: Row, measured: str | None = None) -> str:
    """Mean ± half the interval: in percent, but for losses and perplexity.

    Args:
        measured: What was measured on the task, where its name does not say it.

    Example:
        >>> cell({"task": "ends", "mean": 0.5, "low": 0.25, "high": 0.75}), cell({"task": "ends", "mean": 1, "low": None})
        ('50.0 ± 25.0', '100.0')
    """
    kind = measured or row["task"]
    scale, form = (1, PLAIN[kind]) if kind in PLAIN else (100, ".1f")
    spread = "" if row["low"] is None else f" ± {format(scale * (row['high'] - row['mean']), form)}"
    return format(scale * row["mean"], form) + spread
