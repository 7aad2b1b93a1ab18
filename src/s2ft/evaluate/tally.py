"""Counts, shares and their 95% intervals.

Shares have Wilson's interval, which stays within [0, 1] and is honest near its ends, where p ± z √(p(1-p)/n) is not.

Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any

from s2ft.evaluate.answers import Row
from s2ft.evaluate.tasks import TASKS, Task

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share; (0, 1) where nothing was counted.

    Example:
        >>> [round(end, 4) for end in wilson(8, 10)]
        [0.4902, 0.9433]
    """
    from scipy.stats import binomtest  # takes a second to import

    if not count:
        return 0.0, 1.0
    low, high = binomtest(right, count).proportion_ci(LEVEL, method="wilson")
    return float(low), float(high)


def percent(share: float | None) -> str:
    """A share as tables show it; None where no question was answered.

    Example:
        >>> percent(0.125), percent(None)
        ('12.5%', 'no answer')
    """
    return "no answer" if share is None else f"{share:.1%}"


def mean_interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """The mean of independent values and the normal 95% interval around it; None for fewer than two values."""
    if len(values) < 2:
        return None
    mean, half = fmean(values), Z * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def tally(task: Task, rows: Iterable[Row], asked: int) -> list[dict[str, Any]]:
    """The table's rows of a task: one, or two where it has a strict reading.

    The accuracy is the share of right answers among those that were produced; errors are counted beside it.
    """
    rows = list(rows)
    counts = [_counts(rows, "extracted", "correct")]
    if task.strict is not None:
        counts.append(_counts(rows, "strict", "strict_correct"))
    names = {"suite": task.suite, "asked": asked, "test_set": task.size}
    titles = (task.name, f"{task.name} (strict)")
    return [{"task": title, **names, **count} for title, count in zip(titles, counts, strict=False)]


def _counts(rows: list[Row], reading: str, verdict: str) -> dict[str, Any]:
    answered = [row for row in rows if row["error"] is None]
    right = sum(row[verdict] for row in answered)
    low, high = wilson(right, len(answered))
    return {
        "answered": len(answered),
        "errors": len(rows) - len(answered),
        "correct": right,
        "unread": sum(row[reading] is None for row in answered),  # no answer was found in the text: counts as wrong
        "truncated": sum(row["truncated"] for row in answered),
        "accuracy": right / len(answered) if answered else None,
        "low": low,
        "high": high,
    }


def macro(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model and suite, the mean of its tasks' accuracies. Strict readings are left out, as in the paper.

    Example:
        >>> rows = [{"model": "base", "suite": "arithmetic", "task": name, "accuracy": share}
        ...         for name, share in (("gsm8k", 0.25), ("aqua", 0.75), ("aqua (strict)", 0.0))]
        >>> macro(rows)
        [{'model': 'base', 'suite': 'arithmetic', 'tasks': 2, 'suite_tasks': 7, 'accuracy': 0.5}]
    """
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["task"] in TASKS and row["accuracy"] is not None:
            found.setdefault((row["model"], row["suite"]), []).append(row["accuracy"])
    sizes = {suite: sum(task.suite == suite for task in TASKS.values()) for _, suite in found}
    return [
        {"model": model, "suite": suite, "tasks": len(shares), "suite_tasks": sizes[suite], "accuracy": fmean(shares)}
        for (model, suite), shares in found.items()
    ]
