"""The picture of a study of rates: held-out loss against learning rate, a panel for each case and one for its variants.

A line for each contender, with its interval where there are several seeds; a star is the rule's rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2ft.lab.study.report import StudyReport
from s2ft.lab.study.summary import Row

RULE = "rule"  # in place of a rate: the one that follows from method and run
FEWEST = 2  # rates that make a line
ROOM = 1.5  # below the lowest mean and above the highest, as a factor


def curves(report: StudyReport, png: Path) -> None:
    """Draws the means of a report whose rows have `method`, `rate` and `task`, and whose settings have `rules`."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(6.5 * len(report.tasks), 8), layout="constrained")
    panels = figure.subplots(2, len(report.tasks), squeeze=False)
    for (above, below), task in zip(zip(*panels, strict=True), report.tasks, strict=True):
        rows = [row for row in report.summary if row["task"] == task]
        main = report.settings["contenders"]
        _panel(above, report, [row for row in rows if row["method"] in main], task)
        _panel(below, report, [row for row in rows if row["method"] not in main], f"{task}, variants")
    figure.savefig(png, dpi=100)


def _panel(axes: Any, report: StudyReport, rows: Sequence[Row], title: str) -> None:
    if not rows:
        axes.axis("off")
        return
    for place, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        _line(axes, report, [row for row in rows if row["method"] == method], f"C{place % 10}")
    axes.set(title=title, xlabel="learning rate", ylabel=report.settings["measured"], xscale="log", yscale="log")
    means = [row["mean"] for row in rows]  # an interval can reach below zero, which a logarithm has no place for
    axes.set_ylim(min(means) / ROOM, max(means) * ROOM)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


def _line(axes: Any, report: StudyReport, rows: Sequence[Row], color: str) -> None:
    ruled = [row for row in rows if row["rate"] == RULE]
    given = sorted((row for row in rows if row["rate"] != RULE), key=lambda row: float(row["rate"]))
    rates, means = [float(row["rate"]) for row in given], [row["mean"] for row in given]
    axes.plot(rates, means, "o-" if len(given) >= FEWEST else "o", color=color, markersize=4, label=rows[0]["method"])
    sure = [(float(row["rate"]), row["low"], row["high"]) for row in given if row["low"] is not None]
    if len(sure) >= FEWEST:
        axes.fill_between(*zip(*sure, strict=True), color=color, alpha=0.15)
    for row in ruled:
        rate = report.settings["rules"][f"{row['method']} on {row['task']}"]
        axes.plot(rate, row["mean"], "*", color=color, markersize=12)
