"""The learning rate of a method: the best of a grid that grows until the best is not at its edge.

    score   ·  ·  ●  ·            the grid at first: neighbours differ by a factor of 2
    rate    1  2  4  8            best at 4: inside, done; best at 8: 16 is tried, and so on

Of equally good rates the lowest is taken, which forgets the least; a rate whose training diverges is the worst. A grid grows
by `STEPS` rates at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from s2ft.finetune.trainer import DivergedError
from s2ft.lab.study.runs import Done, Performer, Result, Runs, Settings, timed

FACTOR = 2
DIVERGED = "diverged"  # in the result of a run that did
STEPS = 4  # the most that a grid grows by


def best_rate(
    runs: Runs,
    rates: Sequence[float],
    settings: Settings,
    run: Callable[[float], Result],
    score: Callable[[Result], float],
) -> float:
    """The rate whose run has the highest score.

    Args:
        rates: Tried in any case, neighbours a factor of 2 apart.
        settings: Of a run, but for its rate.
        run: Trains at a rate.
        score: What is best of a run at its highest.
    """

    def perform(asked: list[Settings]) -> Iterator[tuple[int, Done]]:
        for place, own in enumerate(asked):
            yield place, timed(partial(_attempt, run, own["rate"]))

    return best_of_grid(runs, rates, settings, perform, score)


def best_of_grid(
    runs: Runs, rates: Sequence[float], settings: Settings, perform: Performer, score: Callable[[Result], float]
) -> float:
    """As `best_rate`, for runs that are performed from their settings, several at a time."""
    scores: dict[float, float] = {}
    wanted = list(rates)
    while wanted:
        results = runs.results([{**settings, "rate": rate} for rate in wanted], perform)
        scores |= {rate: _score(result, score) for rate, result in zip(wanted, results, strict=True)}
        best = max(sorted(scores), key=scores.__getitem__)
        wanted = _beyond(best, scores) if len(scores) < len(rates) + STEPS else []
        runs.total += len(wanted)
    return best


def best_kept(runs: Runs, rates: Sequence[float], settings: Settings, score: Callable[[Result], float]) -> float | None:
    """The best of the rates that this grid, as far as it may grow, has tried before; None if it has tried none."""
    factors = [float(FACTOR) ** power for power in range(-STEPS, STEPS + 1)]
    reached = sorted({rate * factor for rate in rates for factor in factors})
    asked = [own for rate in reached if runs.has(own := {**settings, "rate": rate})]
    results = runs.results(asked, lambda new: [])
    scores = {own["rate"]: _score(result, score) for own, result in zip(asked, results, strict=True)}
    return max(scores, key=scores.__getitem__, default=None)


def _score(result: Result, score: Callable[[Result], float]) -> float:
    return -math.inf if DIVERGED in result else _finite(score(result))


def _attempt(run: Callable[[float], Result], rate: float) -> Result:
    try:
        return run(rate)
    except DivergedError as error:
        return {DIVERGED: str(error)}


def _finite(score: float) -> float:
    return score if math.isfinite(score) else -math.inf


def _beyond(best: float, tried: dict[float, float]) -> list[float]:
    """The next rate outside of the grid, where the best one is at its edge.

    Example:
        >>> [_beyond(best, dict.fromkeys([1.0, 2.0, 4.0], 0.5)) for best in (1.0, 2.0, 4.0)]
        [[0.5], [], [8.0]]
    """
    outside = {max(tried): best * FACTOR, min(tried): best / FACTOR}
    return [outside[best]] if best in outside else []
