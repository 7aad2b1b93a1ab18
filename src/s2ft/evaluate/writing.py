"""Prompts that have no answer yet are given to an engine, and what comes back is kept at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from s2ft.evaluate.answers import Answers, Row
from s2ft.evaluate.engines import Engine, prompt_ids
from s2ft.evaluate.tally import score_row
from s2ft.evaluate.tasks import Decoding, Prompt, Question, Task, digest

MakeRow = Callable[[str, str | None, bool, str | None, Prompt], Row]  # id, text, truncated?, error, prompt


def write_answers(
    engine: Engine,
    asked: Sequence[tuple[str, Prompt]],
    make_row: MakeRow,
    tokenizer: PreTrainedTokenizerBase,
    answers: Answers,
    decoding: Decoding,
    tell: Callable[[int], None],
) -> None:
    """Adds a row to `answers` for each of `asked` (id, prompt) that has none, or only an error; calls `tell` with how many."""
    ids = [prompt_ids(tokenizer, prompt) for _, prompt in asked]
    done = {index for index, (name, _) in enumerate(asked) if name in answers.done}
    tell(len(done))
    for batch in engine.answers(ids, decoding, done):
        found = [(*asked[index], answer) for index, answer in batch]
        answers.add(make_row(name, one.text, one.truncated, one.error, prompt) for name, prompt, one in found)
        tell(len(found))


def answer_questions(
    engine: Engine,
    task: Task,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    answers: Answers,
    decoding: Decoding,
    tell: Callable[[int], None] = lambda count: None,
) -> None:
    """Asks the questions of a task that have no answer yet; each row holds what was read from the answer, and the verdict."""
    gold = {question.id: question.gold for question in questions}

    def make_row(name: str, text: str | None, truncated: bool, error: str | None, prompt: Prompt) -> Row:
        row: Row = {"id": name, "task": task.name, "prompt": digest(prompt), "output": text, "gold": gold[name]}
        row |= {"truncated": truncated, "error": error}
        return row if text is None else row | score_row(task, text, gold[name])

    asked = [(question.id, question.prompt) for question in questions]
    write_answers(engine, asked, make_row, tokenizer, answers, decoding, tell)
