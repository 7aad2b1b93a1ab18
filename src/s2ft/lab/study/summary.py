"""Means over seeds with Student's 95% interval.

    mean ± t s / √n,    P(|T| ≤ t) = 0.95 with n - 1 degrees of freedom

Few seeds need it: with five, t is 2.78 where the normal distribution has 1.96. For whole degrees of freedom ν the distribution
is a finite sum in θ = atan(t / √ν) (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4), which a
bisection turns round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

Row = dict[str, Any]
LEVEL = 0.95


def within(t: float, freedom: int) -> float:
    """P(|T| ≤ t) of Student's distribution.

    Example:
        >>> round(within(1.0, 1), 12), round(within(2.776445, 4), 6)
        (0.5, 0.95)
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(1 + odd, freedom, 2):  # the terms' factors: 2/3, 4/5, ... or 1/2, 3/4, ...
        total += term
        term *= square * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def student(freedom: int) -> float:
    """The t within which `LEVEL` of the distribution lies.

    Example:
        >>> [round(student(freedom), 3) for freedom in (1, 2, 4, 9)]
        [12.706, 4.303, 2.776, 2.262]
    """
    low, high = 0.0, 1e3
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom) < LEVEL else (low, middle)
    return high


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The interval of the mean; (None, None) for a single value, about whose spread nothing is known."""
    if len(values) < 2:
        return None, None
    half = student(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def summarize(rows: Iterable[Row], by: Sequence[str]) -> list[Row]:
    """One row for each combination of `by`, in order of appearance: mean, interval and number of seeds."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row["score"])
    return [_summary(dict(zip(by, names, strict=True)), scores) for names, scores in groups.items()]


def _summary(names: Row, scores: list[float]) -> Row:
    low, high = interval(scores)
    return {**names, "mean": fmean(scores), "low": low, "high": high, "seeds": len(scores)}
