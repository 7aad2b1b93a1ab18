"""While a command works: bars on stderr, our own log lines, and less noise from the libraries."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def quiet() -> Iterator[None]:
    """Shows what `s2ft` logs; hides the chatter of transformers, TRL and datasets. Their errors still show.

    Only the leading process logs.
    """
    import datasets
    import transformers

    from s2ft.runtime.processes import leads

    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    ours = logging.getLogger("s2ft")
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False, show_level=False)
    ours.addHandler(handler)
    ours.setLevel(logging.INFO if leads() else logging.ERROR)
    if not leads():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        ours.removeHandler(handler)


@contextmanager
def bar(title: str) -> Iterator[Callable[[float], None]]:
    """One bar; it is told the fraction that is done."""
    with Progress(console=Console(stderr=True), transient=True) as display:
        task = display.add_task(title, total=1.0)
        yield lambda done: display.update(task, completed=done)


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each title, with the time that is left; it is told the title, what is done, and the whole."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    tasks: dict[str, TaskID] = {}
    display = Progress(*columns, "left", TimeRemainingColumn(), console=Console(stderr=True), transient=True)

    def tell(title: str, done: int, total: int) -> None:
        display.start()  # not before: another bar may be there until then
        if title not in tasks:
            tasks[title] = display.add_task(title, total=total)
        display.update(tasks[title], completed=done, total=total)

    try:
        yield tell
    finally:
        display.stop()
