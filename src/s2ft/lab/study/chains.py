"""How a study on a real model is run: chains of runs side by side, each of which tunes a rate first.

    chain      tune ─→ seed 0, seed 1, ...        one for each contender and part
    workers    perform what all chains ask for, in the order in which they ask

A base that comes as a GGUF file is converted once, not in every process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from s2ft.common.errors import S2FTError
from s2ft.evaluate.subjects import fingerprint
from s2ft.lab.study.experiment import Experiments
from s2ft.lab.study.runs import Settings
from s2ft.lab.study.workers import Workers
from s2ft.runtime.conversion import convert
from s2ft.runtime.gguf import gguf_file

log = logging.getLogger("s2ft")

T = TypeVar("T")
VERSION = 3  # of what a run measures; runs of another version are not taken


def identity(model: str) -> Settings:
    """What a run on a real model depends on besides its settings. The machine and its libraries are no part of it."""
    return {"model": fingerprint(model, "config.json"), "version": VERSION}


def named(only: str | None, known: Sequence[str]) -> list[str]:
    """What `--only` names, with commas between.

    Raises:
        S2FTError: if a name is not among those that are known.
    """
    asked = [name.strip() for name in only.split(",")] if only else []
    if unknown := [name for name in asked if name not in known]:
        raise S2FTError(f"only: {', '.join(map(repr, unknown))}: must be among {', '.join(known)}")
    return asked


@contextmanager
def experiments(model: str, data: str | None, workers: int, idle: bool = False) -> Iterator[Workers]:
    """Workers that perform runs on the model; `idle`, if there will be none."""
    with TemporaryDirectory() as folder:
        base = model
        if gguf_file(model) is not None and not idle:
            base = str(Path(folder, "base"))
            convert(model, Path(base))
        with Workers(Experiments, (base, data), workers) as performers:
            yield performers


def side_by_side(chains: Sequence[Callable[[], T]], workers: Workers) -> list[T]:
    """What the chains return, in order; one after the other where there is a single worker.

    A chain may write where its caller has the lock.

    Raises:
        Exception: what the first chain that failed raised, when the runs that have begun have ended.
        KeyboardInterrupt: likewise, by Ctrl-C.
    """
    if workers.count == 1:
        return [chain() for chain in chains]
    with ThreadPoolExecutor(max_workers=len(chains)) as threads:
        running = [threads.submit(copy_context().run, chain) for chain in chains]
        try:
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            for failed in (one for one in done if one.exception() is not None):
                log.error("a run failed, so the study stops: %s", failed.exception())
                failed.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            workers.stop()
            raise
        return [one.result() for one in running]
