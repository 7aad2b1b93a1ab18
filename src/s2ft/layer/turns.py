"""The lock by which threads share a live model: passes run together, changes run alone.

    together   forward passes and generation            any number of threads
    alone      switch, merge, set_adapter, a mixed batch (whose hooks are on the layers), a pool's moves, entering in_place ...

Calls of one thread may nest: a pass inside a change, and a change inside a pass, once no other thread has one under way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, get_ident

import torch

from s2ft.common.errors import S2FTError


class Turns:
    """The lock of one model."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._passes: Counter[int] = Counter()  # thread → its passes under way
        self._owner: int | None = None  # the thread that makes a change
        self._depth = 0  # of its nested changes
        self._waiting = 0  # threads that wait to make a change; new passes let them go first
        self._from_a_pass: int | None = None  # the one of them that waits inside a pass of its own

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        """Copies and pickles start as new: no thread uses them yet."""
        return Turns, ()

    @contextmanager
    def together(self) -> Iterator[None]:
        """For a forward pass. Does nothing in compiled code."""
        if torch.compiler.is_compiling():
            yield
            return
        me = get_ident()
        with self._changed:
            if me != self._owner and not self._passes[me]:
                self._changed.wait_for(lambda: self._owner is None and not self._waiting)
            self._passes[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._passes[me] -= 1
                self._passes += Counter()  # drops those at zero
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For a change: waits until no other thread has a pass or a change under way.

        Raises:
            S2FTError: inside a pass, if another thread is waiting inside a pass too: neither could go on.
        """
        me = get_ident()
        with self._changed:
            if self._owner != me:
                self._wait(me)
            self._owner = me
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._owner = None
                    self._changed.notify_all()

    def _wait(self, me: int) -> None:
        in_a_pass = bool(self._passes[me])
        if in_a_pass and self._from_a_pass is not None:
            raise S2FTError("two threads want to change this model, each inside of a forward pass of its own")
        if in_a_pass:
            self._from_a_pass = me
        self._waiting += 1
        try:
            self._changed.wait_for(lambda: self._owner is None and not set(+self._passes) - {me})
        finally:
            self._waiting -= 1
            if in_a_pass:
                self._from_a_pass = None
            self._changed.notify_all()
