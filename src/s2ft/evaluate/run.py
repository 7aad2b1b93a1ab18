"""Evaluation in one call: options → checked data → answers, kept as they come → counts, accuracies, intervals.

    output/base/gsm8k.jsonl           every answer, what was read from it, and the verdict
    output/my-adapter/gsm8k.jsonl     the same of an adapter

Questions that have an answer are not asked again: after an interruption the same call continues, and once all is answered it
only counts. An answer that could not be produced is counted as an error, not as wrong, and tried again by the next call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from s2ft.common.locks import locked
from s2ft.evaluate.answers import Answers, answer_questions
from s2ft.evaluate.engines import check_vllm
from s2ft.evaluate.judge import Judge
from s2ft.evaluate.mt_bench import (
    MT_BENCH,
    TURNS,
    Dialogue,
    judge_dialogues,
    load_dialogues,
    tally_ratings,
    turn_id,
    write_dialogues,
)
from s2ft.evaluate.options import ADAPTER_FILE, AUTO, MODEL_FILE, PROMPTS, EvalOptions, Subject, find_subjects
from s2ft.evaluate.questions import Question, digest, load_questions
from s2ft.evaluate.subjects import Models, fingerprint, trained_on
from s2ft.evaluate.tally import macro, tally
from s2ft.evaluate.tasks import Task
from s2ft.runtime.environment import environment
from s2ft.runtime.failures import clear_failures
from s2ft.runtime.precision import choose_precision

log = logging.getLogger("s2ft")

Tell = Callable[[str, int, int], None]  # title, questions done, of how many


@dataclass(frozen=True)
class EvalReport:
    """What came out: `rows` (one for each model and task), `means` (for each suite), `ratings` (MT-Bench)."""

    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    means: list[dict[str, Any]] = field(default_factory=list)
    ratings: list[dict[str, Any]] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """How many answers or ratings are missing because of an error."""
        answers = (row["errors"] for row in self.rows if "(strict)" not in row["task"])
        ratings = (row["errors"] for row in self.ratings if row["part"].startswith("turn"))
        return int(sum(answers) + sum(ratings))

    def as_dict(self) -> dict[str, Any]:
        """The JSON form, with the environment that it was made in."""
        parts = {"rows": self.rows, "means": self.means, "ratings": self.ratings}
        return {"environment": environment(), "settings": self.settings, **parts}


@dataclass(frozen=True)
class _Job:
    """One task of one model, what is asked in it, and the answers that are there already."""

    subject: Subject
    words: str
    task: Task
    asked: list[Question] | list[Dialogue]
    answers: Answers

    @property
    def questions(self) -> list[Question]:
        return [item for item in self.asked if isinstance(item, Question)]

    @property
    def dialogues(self) -> list[Dialogue]:
        return [item for item in self.asked if isinstance(item, Dialogue)]

    @property
    def names(self) -> list[str]:
        """The ids of the answers that are wanted."""
        turns = [turn_id(dialogue, turn) for dialogue in self.dialogues for turn in TURNS]
        return [question.id for question in self.questions] + turns

    @property
    def is_done(self) -> bool:
        return set(self.names) <= self.answers.done


def evaluate(options: EvalOptions, tell: Tell = lambda *_: None, judge: Judge | None = None) -> EvalReport:
    """Asks the questions that have no answer yet, then counts.

    Args:
        options: From `EvalOptions.parse`, which looks for the files that they name.
        tell: Called with a title, how many questions are done, and of how many.
        judge: Rates MT-Bench's answers; that of the options or the environment unless given. Without one they are only written.

    Raises:
        S2FTError: for anything wrong with options, data, model, adapters or output, before anything is written; for a judge
            that cannot be used, with all answers kept.
    """
    if options.engine == "vllm":
        check_vllm()
    judge = judge or options.judge()
    advice = f"lower batch_size={options.batch_size}, or take precision='bf16'"
    with clear_failures(advice, str(options.output)), ExitStack() as locks:
        models = _models(options)
        jobs = _jobs(options, models.dtype, locks)
        for subject, own in groupby(jobs, key=lambda job: job.subject):
            pending = [job for job in own if not job.is_done]
            if pending:
                _write(models, subject, pending, options, tell)
        return _report(options, jobs, judge, tell)


def _models(options: EvalOptions) -> Models:
    dtype, _ = choose_precision(options.precision)
    return Models(options.model, dtype, options.engine, options.batch_size)


def _jobs(options: EvalOptions, dtype: torch.dtype, locks: ExitStack) -> list[_Job]:
    """Every task of every subject; their files of answers are locked until `locks` closes.

    All questions are loaded before the first file is looked at.
    """
    subjects = find_subjects(options.adapter)
    words = {subject: choose_words(options, subject) for subject in subjects}
    asked = {(task, style): _load(task, options, style) for style in set(words.values()) for task in options.tasks}
    identity = {"model": fingerprint(options.model, MODEL_FILE), "precision": str(dtype).removeprefix("torch.")}
    jobs = []
    for subject in subjects:
        identity["adapter"] = fingerprint(subject.adapter, ADAPTER_FILE) if subject.adapter else "none"
        for task in options.tasks:
            style, questions = words[subject], asked[task, words[subject]]
            path = options.output / subject.label / f"{task.name}.jsonl"
            locks.enter_context(locked(path))
            run = {"task": task.name, **identity, **_conditions(options, task, style, questions)}
            jobs.append(_Job(subject, style, task, questions, Answers(path, run)))
    return jobs


def choose_words(options: EvalOptions, subject: Subject) -> str:
    """The words that a subject is asked in: those that were chosen, or those that it was trained on; else Alpaca's."""
    prompt, trained = options.prompt, None
    if subject.adapter is not None or not Path(options.model).is_file():  # a whole model may have been trained, too
        trained = trained_on(subject.adapter or options.model)
    if prompt == AUTO:
        if trained in PROMPTS:
            log.info("%s is asked in the words of %s, as it was trained", subject.label, trained)
        return trained if trained in PROMPTS else PROMPTS[0]
    if trained in PROMPTS and trained != prompt:
        log.warning("%s was trained on %s, but is asked in the words of %s", subject.label, trained, prompt)
    return prompt


def _load(task: Task, options: EvalOptions, words: str) -> list[Question] | list[Dialogue]:
    if task == MT_BENCH:
        return load_dialogues(options.data, options.limit)
    return load_questions(task, options.data, options.limit, words)


def _conditions(options: EvalOptions, task: Task, words: str, asked: Sequence[Question | Dialogue]) -> dict[str, Any]:
    """What answers depend on, beside the model; not the batch size, which may be lowered when memory runs out."""
    conditions = {"limit": options.limit, "prompt": words, "engine": options.engine} | vars(options.decoding(task))
    return {**conditions, "questions": digest([vars(item) for item in asked])}


def _write(models: Models, subject: Subject, jobs: list[_Job], options: EvalOptions, tell: Tell) -> None:
    with models.engine(subject) as engine:
        for job in jobs:
            told = _counting(tell, f"{subject.label}: {job.task.name}", len(job.names))
            rest = (models.tokenizer, job.answers, options.decoding(job.task), told)
            if job.task == MT_BENCH:
                write_dialogues(engine, job.dialogues, job.words, *rest)
            else:
                answer_questions(engine, job.task, job.questions, *rest)


def _counting(tell: Tell, title: str, total: int) -> Callable[[int], None]:
    """Adds up what is reported in parts, and tells the sum."""
    done = 0

    def told(more: int) -> None:
        nonlocal done
        done += more
        tell(title, done, total)

    return told


def _report(options: EvalOptions, jobs: list[_Job], judge: Judge | None, tell: Tell) -> EvalReport:
    report = EvalReport(_settings(options, judge) | {"words": {job.subject.label: job.words for job in jobs}})
    for job in jobs:
        label = job.subject.label
        if job.task == MT_BENCH:
            told = _counting(tell, f"{label}: rated", len(job.names))
            ratings = judge_dialogues(judge, job.dialogues, job.answers, told)
            found = tally_ratings(job.dialogues, job.answers, ratings)
            report.ratings.extend({"model": label, **row} for row in found)
        else:
            rows = [job.answers.rows[name] for name in job.names if name in job.answers.rows]
            report.rows.extend({"model": label, **row} for row in tally(job.task, rows, len(job.names)))
    report.means.extend(macro(report.rows))
    return report


def _settings(options: EvalOptions, judge: Judge | None) -> dict[str, Any]:
    names = ("model", "data", "limit", "batch_size", "prompt", "precision", "engine")
    return {
        **{name: getattr(options, name) for name in names},
        "adapters": options.adapter,
        "tasks": {task.name: vars(options.decoding(task)) for task in options.tasks},
        "judge": None if judge is None else judge.model,
    }
