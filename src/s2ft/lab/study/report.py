"""What a study returns: rows (one score each), their means with intervals, a table, and a picture.

rows      method or strategy, task, seed, score
summary   method or strategy, task, mean, low, high, seeds
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

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
    picture: Callable[[StudyReport, Path], None] | None = None  # grouped bars unless given

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
            cells.setdefault(self.label(row), {})[row["task"]] = cell(row, self.settings.get("measured"))
        tasks = self.tasks
        return [
            {" / ".join(self.by): name, **{task: own.get(task, "–") for task in tasks}} for name, own in cells.items()
        ]

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


def draw(report: StudyReport, png: Path) -> None:
    """Writes the report's picture."""
    (report.picture or _grouped_bars)(report, png)


def _grouped_bars(report: StudyReport, png: Path) -> None:
    """Grouped bars with their intervals: a group for each task, a bar for each contender."""
    from matplotlib.figure import Figure  # slow to import

    tasks = [task for task in report.tasks if task not in PLAIN]
    summary = [row for row in report.summary if row["task"] in tasks]
    labels = list(dict.fromkeys(map(report.label, summary)))
    figure = Figure(figsize=(max(7.0, 0.17 * len(labels) * len(tasks) + 2), 4.2), layout="constrained")
    axes = figure.subplots()
    for place, label in enumerate(labels):
        own = [row for row in summary if report.label(row) == label]
        _bars(
            axes,
            own,
            [tasks.index(row["task"]) + (place - (len(labels) - 1) / 2) * 0.8 / len(labels) for row in own],
            0.8 / len(labels),
            label,
            place / max(1, len(labels) - 1),
        )
    axes.set(xticks=range(len(tasks)), ylabel="exact match, %", ylim=(0, 105))
    many = len(tasks) > 3
    axes.set_xticklabels(tasks, rotation=15 if many else 0, ha="right" if many else "center")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(png, dpi=100)


def _bars(axes: Any, rows: Sequence[Row], places: list[float], width: float, label: str, shade: float) -> None:
    from matplotlib import colormaps

    means = np.array([100 * row["mean"] for row in rows])
    errors = np.array([0 if row["high"] is None else 100 * (row["high"] - row["mean"]) for row in rows])
    axes.bar(places, means, width, yerr=errors, label=label, color=colormaps["viridis"](shade), capsize=1.5)
