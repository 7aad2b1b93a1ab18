"""The picture of a study: a group of bars for each task, a bar for each contender, with its interval.

bars            accuracies
bars_by_part    a row of panels for each part of a study: held-out loss and perplexity as points, accuracies as bars
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from s2ft.lab.study.contenders import VANILLA
from s2ft.lab.study.report import HELD_OUT, PERPLEXITY, PLAIN, StudyReport
from s2ft.lab.study.summary import Row

_GROUP = 0.8  # the width of a group, where groups are 1 apart
_FEW = 3  # tasks whose names fit side by side

Label = Callable[[Row], str]


def draw(report: StudyReport, png: Path) -> None:
    """Writes the report's picture."""
    (report.picture or bars)(report, png)


def bars(report: StudyReport, png: Path) -> None:
    """Draws the accuracies in one panel."""
    from matplotlib.figure import Figure  # slow to import

    tasks = [task for task in report.tasks if task not in PLAIN]
    rows = [row for row in report.summary if row["task"] in tasks]
    size = len(_distinct(rows, report.label)) * len(tasks)
    figure = Figure(figsize=(max(7.0, 0.17 * size + 2), 4.2), layout="constrained")
    _accuracies(figure.subplots(), rows, report.label)
    figure.savefig(png, dpi=100)


def bars_by_part(report: StudyReport, png: Path) -> None:
    """Draws a report whose rows have `part` and `method`."""
    from matplotlib.figure import Figure  # slow to import

    parts = _distinct(report.summary, lambda row: str(row["part"])) or ["nothing was run"]
    figure = Figure(figsize=(16, 1 + 3.5 * len(parts)), layout="constrained")
    panels = figure.subplots(len(parts), 3, squeeze=False, width_ratios=(1, 1, 3))
    for part, (loss, perplexity, accuracies) in zip(parts, panels, strict=True):
        rows = [row for row in report.summary if row["part"] == part]
        loss.set_title(part, loc="left")
        trained = [row for row in rows if row["method"] != VANILLA.name]  # close together, far below the base
        _points(loss, trained, HELD_OUT)
        _points(perplexity, rows, PERPLEXITY)
        _accuracies(accuracies, rows, _method)
    figure.savefig(png, dpi=100)


def _points(axes: Any, rows: Sequence[Row], task: str) -> None:
    """Means and intervals of one task, the first contender on top."""
    own = [row for row in rows if row["task"] == task]
    if not own:
        axes.axis("off")
        return
    axes.errorbar(
        [row["mean"] for row in own], range(len(own)), xerr=[_half(row) for row in own], fmt="o", color="C0", capsize=2
    )
    axes.set(xlabel=task, yticks=range(len(own)), yticklabels=[_method(row) for row in own])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


def _accuracies(axes: Any, rows: Sequence[Row], label: Label) -> None:
    from matplotlib import colormaps

    rows = [row for row in rows if row["task"] not in PLAIN]
    if not rows:
        axes.axis("off")
        return
    tasks, labels = _distinct(rows, lambda row: str(row["task"])), _distinct(rows, label)
    width = _GROUP / len(labels)
    for place, name in enumerate(labels):
        own = [row for row in rows if label(row) == name]
        axes.bar(
            [tasks.index(row["task"]) + (place - (len(labels) - 1) / 2) * width for row in own],
            [100 * row["mean"] for row in own],
            width,
            yerr=[100 * _half(row) for row in own],
            label=name,
            color=colormaps["viridis"](place / max(1, len(labels) - 1)),
            capsize=1.5,
        )
    axes.set(xticks=range(len(tasks)), ylabel="exact match, %", ylim=(0, 105))
    many = len(tasks) > _FEW
    axes.set_xticklabels(tasks, rotation=15 if many else 0, ha="right" if many else "center")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)


def _half(row: Row) -> float:
    """Half the interval; 0 where a single run has none."""
    return 0.0 if row["high"] is None else float(row["high"] - row["mean"])


def _distinct(rows: Sequence[Row], label: Label) -> list[str]:
    return list(dict.fromkeys(map(label, rows)))


def _method(row: Row) -> str:
    return str(row["method"])
