"""Scores for the run card: what fine-tuning gained on the tasks that it was for, and what it lost on others.

    "scores": {"gsm8k": {"base": 0.11, "tuned": 0.49, "base_interval": [0.09, 0.13], "tuned_interval": [0.46, 0.52],
                         "questions": 1319, "errors": 0}, ...}

An adapter is compared with its own base by switching it off. Where training changes the base itself, it is scored before:

    checked = check_scores(["arithmetic"], "llm-adapters")      # before training: all that could be wrong is said now
    scorer = Scorer(tokenizer, checked, folder)
    scorer.score_base(model)                                    # before training, if its weights will be gone afterwards
    card["scores"] = scorer.compare(model)
    card["answers"] = scorer.answers()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from s2ft.common.errors import S2FTError
from s2ft.evaluate.answers import Answers, Row, answer_questions, read_answers
from s2ft.evaluate.engines import TransformersEngine
from s2ft.evaluate.questions import Question, load_questions, prompt_text
from s2ft.evaluate.tally import tally
from s2ft.evaluate.tasks import DECODING, Task, find_tasks

Scores = dict[str, dict[str, Any]]  # task → a row of `tally`


@dataclass(frozen=True)
class Checked:
    """Tasks whose data was loaded without a problem."""

    questions: list[tuple[Task, list[Question]]]


def check_scores(tasks: Sequence[str], data: str, limit: int | None = None, prompts: str = "alpaca") -> Checked:
    """Loads the questions of tasks and suites (names), at most `limit` of each, so that problems show before training.

    They are asked in the words of `prompts`, "alpaca" or "chat".

    Raises:
        S2FTError: for an unknown task, one that needs a judge, or data that is missing or malformed.
    """
    found = find_tasks(tasks)
    judged = [task.name for task in found if task.rule is None]
    if judged:
        raise S2FTError(f"evaluate={', '.join(judged)!r} needs a judge, so a run card cannot hold it; use `s2ft eval`")
    return Checked([(task, load_questions(task, data, limit, prompts)) for task in found])


def score(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    checked: Checked,
    folder: Path,
    batch_size: int = 8,
    tell: Callable[[int], None] = lambda count: None,
    beams: int | None = None,
) -> Scores:
    """Asks a live model, as it is, all questions anew; keeps its answers in `folder`, a JSONL file for each task.

    Args:
        model: Any causal language model; left in the mode (training or not) that it is in.
        tokenizer: Its tokenizer.
        checked: From `check_scores`.
        folder: For the answers; those of an earlier call are replaced.
        batch_size: Prompts that go through the model at once.
        tell: Called with how many more questions are done.
        beams: 1 is greedy; the suite's unless given.
    """
    engine = TransformersEngine(model, tokenizer, batch_size)
    scores: Scores = {}
    for task, questions in checked.questions:
        path = folder / f"{task.name}.jsonl"
        path.unlink(missing_ok=True)
        usual = DECODING[task.suite]
        decoding = replace(usual, beams=beams or usual.beams)
        answers = Answers(path, {"task": task.name, **vars(decoding)})
        answer_questions(engine, task, questions, tokenizer, answers, decoding, tell)
        scores |= {row["task"]: row for row in tally(task, answers.rows.values(), len(questions))}
    return scores


def section(base: Scores, tuned: Scores) -> dict[str, dict[str, Any]]:
    """The section for the run card: base against tuned, task by task."""
    return {
        name: {
            "base": base[name]["accuracy"],
            "tuned": tuned[name]["accuracy"],
            "base_interval": [base[name]["low"], base[name]["high"]],
            "tuned_interval": [tuned[name]["low"], tuned[name]["high"]],
            "questions": base[name]["asked"],
            "errors": base[name]["errors"] + tuned[name]["errors"],
        }
        for name in base
    }


class Scorer:
    """Base against tuned for one run of training; its answers are kept in `folder`/base and `folder`/tuned."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        checked: Checked | None,  # None: nothing is scored
        folder: Path,
        batch_size: int = 8,
        tell: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.checked, self.folder = checked, folder
        self._score = partial(score, tokenizer=tokenizer, batch_size=batch_size, tell=tell)
        self._base: Scores | None = None

    def score_base(self, model: Any) -> None:
        """Asks a model that training is about to change."""
        if self.checked is not None:
            self._base = self._score(model, checked=self.checked, folder=self.folder / "base")

    def compare(self, model: Any) -> dict[str, dict[str, Any]]:
        """The section for the run card. A model with an adapter is its own base, with the adapter switched off."""
        if self._base is None:
            with model.disable_adapter():
                self.score_base(model)
        if self.checked is None or self._base is None:
            return {}
        return section(self._base, self._score(model, checked=self.checked, folder=self.folder / "tuned"))

    def answers(self, most: int = 4) -> list[Row]:
        """Of each task a few questions with both answers, after `compare`: first those that only one of the two got right."""
        return [
            row
            for task, questions in (self.checked.questions if self.checked is not None else ())
            for row in sorted(self._both(task, questions), key=lambda row: row["base_correct"] == row["tuned_correct"])[
                :most
            ]
        ]

    def _both(self, task: Task, questions: Sequence[Question]) -> list[Row]:
        base, tuned = (read_answers(self.folder / side / f"{task.name}.jsonl") for side in ("base", "tuned"))
        return [
            {"task": task.name, "prompt": prompt_text(one.prompt), "right": one.gold}
            | {"base": base[one.id]["output"], "base_correct": base[one.id]["correct"]}
            | {"tuned": tuned[one.id]["output"], "tuned_correct": tuned[one.id]["correct"]}
            for one in questions
            if all(rows.get(one.id, {}).get("output") is not None for rows in (base, tuned))
        ]
