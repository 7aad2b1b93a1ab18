"""Runs side by side, in processes that each prepare once: a GPU, or a machine of many cores, has room for several.

    with Workers(make, given, count) as workers:     make(*given) → a function from settings to result
        runs.results(asked, workers)                 each result is kept as soon as it is there

`make` is called in each process, before its first run; it and `given` must be picklable, and `given` hashable.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from functools import cache, partial
from threading import RLock
from types import TracebackType

from s2ft.common.errors import S2FTError
from s2ft.lab.study.runs import Done, Result, Settings, timed

Perform = Callable[[Settings], Result]
Asked = tuple[Settings, tuple["Future[Done]", ...]]  # and what was asked for together with it, which its failure ends


class Workers:
    """Performs runs, `count` at a time; a single one in this process.

    Raises:
        S2FTError: if `count` is not 1 at least.
    """

    def __init__(self, make: Callable[..., Perform], given: tuple[Hashable, ...], count: int = 1) -> None:
        if count < 1:
            raise S2FTError(f"workers={count}: must be 1 at least")
        self._make, self._given, self.count = make, given, count
        self._lock = RLock()
        self._waiting: dict[Future[Done], Asked] = {}  # in the order in which they were asked for
        self._running = 0  # never more than `count`: what a pool holds ready besides could not be taken back
        self._stopped = False
        spawn = multiprocessing.get_context("spawn")  # a forked process could not use the GPU
        self._pool = ProcessPoolExecutor(count, mp_context=spawn) if count > 1 else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def stop(self) -> None:
        """Begins no more runs, whoever asks for them: those who do get a `CancelledError`, when their others are done."""
        with self._lock:
            self._stopped = True
            self._withdraw(tuple(self._waiting))

    def __call__(self, asked: list[Settings]) -> Iterator[tuple[int, Done]]:
        """From settings to (place among them, what was done), in any order.

        Raises:
            Exception: what the first run that failed raised. No other is begun, and those under way are done, and given, first.
            KeyboardInterrupt: likewise, by Ctrl-C; by a second one at once.
        """
        if self._pool is None:
            for place, settings in enumerate(asked):
                yield place, _perform(self._make, self._given, settings)
            return
        left: dict[Future[Done], int] = {Future(): place for place in range(len(asked))}
        self._ask(left, asked)
        failures: list[BaseException] = []
        while left:
            try:
                ended, _ = wait(left, return_when=FIRST_COMPLETED)
            except KeyboardInterrupt as interrupt:
                if failures:
                    raise
                failures, ended = [interrupt], set()
                self._withdraw(tuple(left))
            for run in ended:
                place, error = left.pop(run), _error(run)
                if error is None:
                    yield place, run.result()
                else:
                    failures.append(error)
        if failures:
            raise next((one for one in failures if not isinstance(one, CancelledError)), failures[0])

    def _ask(self, runs: Iterable[Future[Done]], asked: list[Settings]) -> None:
        together = tuple(runs)
        with self._lock:
            self._waiting.update({run: (settings, together) for run, settings in zip(together, asked, strict=True)})
            self._withdraw(together) if self._stopped else self._begin()

    def _begin(self) -> None:
        with self._lock:
            while self._waiting and self._running < self.count:
                run = next(iter(self._waiting))
                settings, together = self._waiting.pop(run)
                run.set_running_or_notify_cancel()
                self._running += 1
                assert self._pool is not None
                begun = self._pool.submit(_perform, self._make, self._given, settings)
                begun.add_done_callback(partial(self._ended, run, together))

    def _ended(self, run: Future[Done], together: tuple[Future[Done], ...], done: Future[Done]) -> None:
        error = _error(done)
        with self._lock:
            self._running -= 1
            if error is not None:
                self._withdraw(together)
        if error is None:
            run.set_result(done.result())
        else:
            run.set_exception(error)
        self._begin()

    def _withdraw(self, runs: Iterable[Future[Done]]) -> None:
        """Cancels those that have not begun."""
        with self._lock:
            for run in runs:
                if self._waiting.pop(run, None) is not None:
                    run.cancel()
                    run.set_running_or_notify_cancel()  # tells those who wait


def _error(run: Future[Done]) -> BaseException | None:
    return CancelledError() if run.cancelled() else run.exception()


def _perform(make: Callable[..., Perform], given: tuple[Hashable, ...], settings: Settings) -> Done:
    return timed(partial(_made(make, given), settings))


@cache
def _made(make: Callable[..., Perform], given: tuple[Hashable, ...]) -> Perform:
    return make(*given)
