"""Which rows run: one thread owns the model, lets jobs join the batch, and takes them out when they are answered.

    submit (any thread) → waiting, in the order of arrival → joining → the batch → events, token by token → gone

In each turn the jobs that fit join, their prompts read together, and then every row gets its next token. A job waits while
the batch is full, or while its adapter does not fit into the pool beside those of the rows under way. A failure is told to
the jobs that it concerns; the thread goes on.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from s2ft.serve.batch import Batch
from s2ft.serve.job import End, Event, Failure, Job, Told
from s2ft.serve.row import Row
from s2ft.serve.sampling import are_finite, choose, tell
from s2ft.tuner.mixing import BASE
from s2ft.tuner.pool import AdapterPool

PREFILL = 4096  # tokens of prompts that are read in one turn, padding included; rows under way wait meanwhile
_log = logging.getLogger("s2ft.serve")


class FullError(Exception):
    """As many jobs as are allowed are waiting already."""


class StoppingError(Exception):
    """The scheduler takes no more jobs."""


class Watch:
    """What the scheduler tells of itself; the server counts it."""

    def step(self, rows: int) -> None:
        """So many rows get a token at once."""

    def turn(self, rows: int, waiting: int) -> None:
        """After each turn: the rows that go on, and the jobs that wait."""

    def adapter(self, tier: str) -> None:
        """A job's adapter was on this tier when the job joined: `device`, `host` or `disk`."""


class Scheduler:
    """Runs jobs on a model.

    Args:
        batch: The rows.
        pool: The batch's adapters.
        tokenizer: For stop strings and text.
        ends: Tokens that end an answer.
        rows: How many go through the model together at most.
        waiting: How many more may wait.
        deliver: Takes the events of a turn; called by the scheduler's thread.
        watch: Counts.
    """

    def __init__(  # noqa: PLR0913 - what it runs on, how much, and for whom
        self,
        batch: Batch,
        pool: AdapterPool,
        tokenizer: object,
        ends: Iterable[int],
        rows: int,
        waiting: int,
        deliver: Callable[[list[tuple[Job, Event]]], None],
        watch: Watch | None = None,
    ) -> None:
        self._batch, self._pool, self._tokenizer, self._ends = batch, pool, tokenizer, frozenset(ends)
        self._most_rows, self._most_waiting = rows, waiting
        self._deliver, self._watch = deliver, watch or Watch()
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._joining: list[Job] = []  # in this turn: no longer waiting, their prompts are not read yet
        self._retired: dict[str, list[Callable[[], None]]] = {}
        self._rows: list[Row] = []  # as in the batch
        self._events: list[tuple[Job, Event]] = []
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="s2ft engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive() and not self._is_closed

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """All of the jobs, or none.

        Raises:
            FullError, StoppingError: if they are not taken.
        """
        with self._changed:
            if self._is_closed:
                raise StoppingError
            if len(self._jobs()) + len(jobs) > self._most_rows + self._most_waiting:
                raise FullError
            self._waiting.extend(jobs)
            self._changed.notify()

    def retire(self, adapter: str, then: Callable[[], None] = lambda: None) -> None:
        """Takes an adapter out of the pool once no job has it; `then` is called by the scheduler's thread."""
        with self._changed:
            self._retired.setdefault(adapter, []).append(then)
            self._changed.notify()

    def stop(self) -> None:
        """Takes no more jobs; those that it has fail at the next turn."""
        with self._changed:
            self._is_closed = True
            for job in self._jobs():
                job.failure = job.failure or "stopping"
            self._changed.notify()

    def close(self) -> None:
        """Stops, and waits for the thread to end."""
        self.stop()
        self._thread.join()

    def _jobs(self) -> list[Job]:
        """All that it has; for whoever holds the lock."""
        return [*self._waiting, *self._joining, *(row.job for row in self._rows)]

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._rows or self._retired or self._is_closed)
                if self._is_closed and not self._waiting and not self._rows:
                    return
            self._turn()

    def _turn(self) -> None:
        try:
            self._drop_failed()
            self._drop_retired()
            self._admit()
            self._join()
            self._step()
        except Exception:  # a bug, or no memory: it costs the rows under way; those that wait get their turn
            _log.exception("the engine failed; the rows under way get no answer")
            self._give_up([*self._joining, *(row.job for row in self._rows)])
            self._enter([], self._joining)
            self._keep([])
        self._watch.turn(len(self._rows), len(self._waiting))
        if self._events:
            events, self._events = self._events, []
            self._deliver(events)

    def _drop_failed(self) -> None:
        """What was cancelled, took too long or is to stop leaves."""
        with self._changed:
            dropped = {job: None for job in self._jobs() if not job.look()}
            self._waiting = deque(job for job in self._waiting if job not in dropped)
        self._tell((job, Failure(job.failure)) for job in dropped if job.failure)
        self._keep([row for row in self._rows if row.job not in dropped])

    def _drop_retired(self) -> None:
        with self._changed:
            used = {job.adapter for job in self._jobs()}
            unused = {name: self._retired.pop(name) for name in [*self._retired] if name not in used}
        for name, calls in unused.items():
            if name in self._pool:
                self._pool.remove(name)
            for then in calls:
                then()

    def _admit(self) -> None:
        """The jobs that fit join, in the order of arrival; their adapters are beside the model."""
        while self._waiting and self._has_room(self._waiting[0]):
            job = self._waiting[0]  # it stays there until its adapter is here: `submit` counts it
            is_ready = self._bring(job)
            if is_ready is None:
                break
            with self._changed:
                self._waiting.popleft()
                if is_ready:
                    self._joining.append(job)

    def _has_room(self, job: Job) -> bool:
        joining = self._joining
        longest = max(len(one.prompt) for one in (*joining, job))
        is_short = not joining or longest * (len(joining) + 1) <= PREFILL
        return is_short and len(self._rows) + len(joining) < self._most_rows

    def _bring(self, job: Job) -> bool | None:
        """Whether the job's adapter is beside the model now; None if it has to wait for others to leave."""
        others = {*self._batch.names, *(one.adapter for one in self._joining)} - {BASE, job.adapter}
        try:
            if job.folder is not None:
                if job.adapter not in self._pool:
                    self._pool.add(job.adapter, job.folder)
                if others and self._pool.size([*others, job.adapter]) > self._pool.device_bytes:
                    return None
                self._watch.adapter(self._pool.tier(job.adapter))
                self._pool.bring([*others, job.adapter])
            return True
        except Exception as error:  # a damaged or foreign file; no memory
            _log.error("the adapter %r cannot be used: %s", job.adapter, error)
            self._tell([(job, Failure("adapter"))])
            return False

    def _join(self) -> None:
        plain = [job for job in self._joining if not job.tell_prompt]
        for group in (plain, *([job] for job in self._joining if job.tell_prompt)):
            if group:
                self._join_together(group)

    def _join_together(self, jobs: list[Job]) -> None:
        """Reads the prompts of jobs that join; those of a prompt whose logprobs are told come alone."""
        rows: list[Row] = []
        try:
            rows = [Row(job, self._tokenizer, self._ends) for job in jobs]
            prompts, adapters = [job.prompt for job in jobs], [job.adapter for job in jobs]
            logits = self._batch.join(prompts, adapters, jobs[0].tell_prompt)
            self._enter(rows, jobs)
            self._begin(rows, logits)
        except Exception:  # a bug, or no memory: the rows under way are as they were
            _log.exception("the engine could not read %d prompts", len(jobs))
            self._give_up(jobs)
            self._enter([], jobs)
            for row in rows:
                row.is_complete = True  # in the batch already, it leaves before the next step

    def _enter(self, rows: list[Row], jobs: Sequence[Job]) -> None:
        """These jobs are joining no more; `rows` are in the batch."""
        with self._changed:
            self._joining = [job for job in self._joining if job not in jobs]
            self._rows += rows

    def _begin(
        self,
        rows: list[Row],
        logits: Tensor,  # [rows, vocabulary]; where the prompt's logprobs are told, [1, length, vocabulary]
    ) -> None:
        """What is told once the prompts are read, and the first token of each row."""
        whole = rows[0].job.tell_prompt
        if whole and not are_finite(logits[0]).all():
            self._fail(rows)
            return
        for row in rows:
            self._tell((row.job, event) for event in row.start(logits[0] if whole else None))
        self._advance(rows, logits[:, -1] if whole else logits)

    def _step(self) -> None:
        self._keep([row for row in self._rows if not row.is_complete])
        if self._rows:
            self._watch.step(len(self._rows))
            self._advance(self._rows, self._batch.step([row.token for row in self._rows]))
            self._keep([row for row in self._rows if not row.is_complete])

    def _advance(self, rows: list[Row], logits: Tensor) -> None:
        """Each row gets its next token."""
        finite = are_finite(logits).tolist()
        self._fail([row for row, is_finite in zip(rows, finite, strict=True) if not (is_finite or row.is_complete)])
        going = [place for place, row in enumerate(rows) if not row.is_complete]
        rows, logits = [rows[place] for place in going], logits[going]
        how = [row.job.sampling for row in rows]
        tokens = choose(logits, how, [row.generator for row in rows]).tolist()
        told = [Told(token) for token in tokens]
        wanted = [place for place, one in enumerate(how) if one.top_logprobs is not None]
        if wanted:
            most = max(how[place].top_logprobs or 0 for place in wanted)
            found = tell(logits[wanted], [tokens[place] for place in wanted], most)
            for place, one in zip(wanted, found, strict=True):
                told[place] = replace(one, top=one.top[: how[place].top_logprobs])
        for row, one in zip(rows, told, strict=True):
            self._tell((row.job, event) for event in row.add(one))

    def _fail(self, rows: Sequence[Row]) -> None:
        """These rows have logits that are not finite, so there is no next token; the others go on."""
        for row in rows:
            row.is_complete = True
            _log.error("the logits by the adapter %r are not finite", row.job.adapter)
            self._tell([(row.job, Failure("overflow"))])

    def _give_up(self, jobs: Iterable[Job]) -> None:
        """The engine failed these jobs; who had an end in this turn keeps it."""
        ended = {job for job, event in self._events if isinstance(event, End | Failure)}
        self._tell((job, Failure("engine")) for job in jobs if job not in ended)

    def _keep(self, rows: list[Row]) -> None:
        if len(rows) < len(self._rows) or len(self._batch) != len(rows):
            places = {row: place for place, row in enumerate(self._rows)}
            self._batch.keep([places[row] for row in rows])
            self._rows = rows

    def _tell(self, events: Iterable[tuple[Job, Event]]) -> None:
        self._events += events
