"""Runs side by side, in processes that each prepare once: a GPU, or a machine of many cores, has room for several.

    with Workers(make, given, count) as workers:     make(*given) → a function from settings to result
        runs.results(asked, workers)                 each result is kept as soon as it is there

`make` is called in each process, before its first run; it and `given` must be picklable, and `given` hashable.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import cache, partial
from types import TracebackType

from s2ft.lab.study.runs import Done, Result, Settings, timed

Perform = Callable[[Settings], Result]


class Workers:
    """Performs runs, `count` at a time; a single one in this process."""

    def __init__(self, make: Callable[..., Perform], given: tuple[Hashable, ...], count: int = 1) -> None:
        self._make, self._given, self.count = make, given, count
        self._waiting: set[Future[Done]] = set()
        self._stopped = False
        spawn = multiprocessing.get_context("spawn")  # a forked process could not use the GPU
        self._pool = ProcessPoolExecutor(count, mp_context=spawn) if count > 1 else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def stop(self) -> None:
        """Begins no more runs, whoever asks for them: to those who wait for one, a `CancelledError` is raised."""
        self._stopped = True
        for run in tuple(self._waiting):
            run.cancel()

    def __call__(self, asked: list[Settings]) -> Iterator[tuple[int, Done]]:
        """From settings to (place among them, what was done), in any order.

        Raises:
            Exception: what the first run that failed raised, at once: those that have not begun are not begun.
        """
        if self._pool is None:
            for place, settings in enumerate(asked):
                yield place, _perform(self._make, self._given, settings)
            return
        places = {
            self._pool.submit(_perform, self._make, self._given, settings): place
            for place, settings in enumerate(asked)
        }
        self._waiting.update(places)
        if self._stopped:  # looked at when `stop` can find them
            self.stop()
        try:
            for done in as_completed(places):
                yield places[done], done.result()
        finally:
            for waiting in places:
                waiting.cancel()
            self._waiting.difference_update(places)


def _perform(make: Callable[..., Perform], given: tuple[Hashable, ...], settings: Settings) -> Done:
    return timed(partial(_made(make, given), settings))


@cache
def _made(make: Callable[..., Perform], given: tuple[Hashable, ...]) -> Perform:
    return make(*given)
