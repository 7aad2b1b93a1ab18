"""MT-Bench: 80 questions of 8 categories, each with a second one that builds on the answer to the first.

    question 1 → answer 1 → question 2 → answer 2        written by the model, kept in mt-bench.jsonl
    question, answer (and reference) → Rating: [[n]]     by a judge (`judge.py`), kept in mt-bench.JUDGE.jsonl

Rating is a step of its own, one turn at a time, so that answers outlive a judge that fails. A rating belongs to the text that
it was given for: an answer that was written anew is rated anew.

Questions lie in FOLDER/mt_bench/question.jsonl or FOLDER/question.jsonl (`question_id`, `category`, `turns`), reference answers
in `reference_answer/*.jsonl` beside it. A data set on the Hub may hold both, as HuggingFaceH4/mt_bench_prompts does.

Source: Zheng et al., Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena, 2023 (https://arxiv.org/abs/2306.05685), whose
single-answer grading this is. The judge is asked in our own words, so ratings compare among runs with one judge here, and only
roughly with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from s2ft.common.errors import S2FTError, raise_by_place, raise_together
from s2ft.data.prompts import alpaca_conversation
from s2ft.data.records import read_records
from s2ft.evaluate.answers import Answers, Row, write_answers
from s2ft.evaluate.engines import Engine
from s2ft.evaluate.judge import HIGHEST, LOWEST, Judge, JudgeDown, NoRating
from s2ft.evaluate.questions import Prompt, digest
from s2ft.evaluate.tally import mean_interval
from s2ft.evaluate.tasks import TASKS, Decoding, find_data, missing

MT_BENCH = TASKS["mt-bench"]
TURNS = (1, 2)
NEED_REFERENCE = ("math", "reasoning", "coding")  # a judge may not know the answer to these


@dataclass(frozen=True)
class Dialogue:
    """A pair of questions, and the reference answers to them where there are any."""

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...]

    def prompt(self, answers: list[str], prompts: str) -> Prompt:
        """The prompt for the question after those that `answers` answer."""
        asked = self.turns[: len(answers) + 1]
        if prompts == "alpaca":
            return alpaca_conversation(list(zip(asked, answers, strict=False)), asked[-1])
        messages = [{"role": "user", "content": asked[0]}]
        for answer, question in zip(answers, asked[1:], strict=True):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        return messages


def turn_id(dialogue: Dialogue, turn: int) -> str:
    """The name of a turn's row, such as "81-2"."""
    return f"{dialogue.id}-{turn}"


def load_dialogues(data: str, limit: int | None = None) -> list[Dialogue]:
    """The questions with their reference answers.

    Raises:
        S2FTError: if there are none, or one lacks a turn, or the reference that its category needs.
    """
    if Path(data).is_dir() or missing([MT_BENCH], data):
        file = Path(find_data(MT_BENCH, data))
        references, source = _references(file.parent / "reference_answer"), str(file)
    else:
        references, source = {}, data
    problems, found = [], []
    for record in islice(read_records(source), limit):
        dialogue = _dialogue(record.value, references)
        problems += [(record.place, problem) for problem in _problems(dialogue)]
        found.append(dialogue)
    raise_by_place(problems)
    return found


def write_dialogues(
    engine: Engine,
    dialogues: list[Dialogue],
    prompts: str,
    tokenizer: PreTrainedTokenizerBase,
    answers: Answers,
    decoding: Decoding,
    tell: Callable[[int], None],
) -> None:
    """Writes the answers to both turns that are not there yet; all of the first turn before any of the second."""
    for turn in TURNS:
        asked: list[tuple[str, Prompt]] = []
        for dialogue in dialogues:
            name, before = turn_id(dialogue, turn), earlier(dialogue, turn, answers)
            if before is None:
                answers.add([_row(name, None, False, f"turn {turn - 1} has no answer to build on", "")])
                tell(1)
            else:
                asked.append((name, dialogue.prompt(before, prompts)))
        write_answers(engine, asked, _row, tokenizer, answers, decoding, tell)


def earlier(dialogue: Dialogue, turn: int, answers: Answers) -> list[str] | None:
    """The answers to the turns before `turn`; None if one is missing."""
    rows = [answers.rows.get(turn_id(dialogue, before)) for before in range(1, turn)]
    texts = [row["output"] for row in rows if row is not None and row["error"] is None]
    return texts if len(texts) == len(rows) else None


def _row(name: str, output: str | None, truncated: bool, error: str | None, prompt: Any) -> dict[str, Any]:
    return {"id": name, "prompt": digest(prompt), "output": output, "truncated": truncated, "error": error}


def _references(folder: Path) -> dict[str, tuple[str, ...]]:
    """Question → the first reference answer to each turn, from every file of the folder."""
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for record in read_records(str(path)):
            value = record.value
            try:
                found.setdefault(str(value["question_id"]), tuple(value["choices"][0]["turns"]))
            except (KeyError, IndexError, TypeError):
                raise_together([f"{record.place}: expected question_id and choices with turns"])
    return found


def _dialogue(value: Any, references: dict[str, tuple[str, ...]]) -> Dialogue:
    value = value if isinstance(value, dict) else {}
    name = str(value.get("question_id", value.get("prompt_id", "")))
    turns = value.get("turns", value.get("prompt"))
    own = value.get("reference") or ()
    return Dialogue(
        name,
        str(value.get("category", "")),
        tuple(turns) if isinstance(turns, list) else (),
        references.get(name) or tuple(map(str, own)),
    )


def _problems(dialogue: Dialogue) -> list[str]:
    if (
        not dialogue.id
        or len(dialogue.turns) != len(TURNS)
        or not all(isinstance(turn, str) for turn in dialogue.turns)
    ):
        return ["expected question_id, category and two turns, both text"]
    if dialogue.category in NEED_REFERENCE and len(dialogue.references) != len(TURNS):
        return [
            f"question {dialogue.id} ({dialogue.category}) needs a reference answer to both turns, in reference_answer/*.jsonl"
        ]
    return []


GIVE_UP = 3  # questions in a row that the judge left without an answer

_TASK = (
    "You grade answers of a language model. Below is what a user asked and what the model answered. Grade {what}: is it "
    "correct, useful, complete without padding, and does it do what was asked for? {reference}First give your reasons in a few "
    f"sentences, without favour. Then end with one line of exactly this form, n being a number from {LOWEST} (useless) to "
    f"{HIGHEST} (could not be better):\n\nRating: [[n]]"
)
_REFERENCE = (
    "A reference answer is given; compare the answer with it, and name every mistake. What differs from the reference in "
    "content is most likely wrong; other ways to the same result are fine. "
)


def judge_messages(dialogue: Dialogue, answers: list[str]) -> list[dict[str, str]]:
    """What the judge is asked about the last of `answers`."""
    turn = len(answers)
    has_reference = dialogue.category in NEED_REFERENCE and len(dialogue.references) >= turn
    what = "the answer" if turn == 1 else "the last answer; those before it are there for context only"
    parts = []
    for number, (question, answer) in enumerate(zip(dialogue.turns, answers, strict=False), start=1):
        parts.append(_part(f"QUESTION {number}", question))
        if has_reference:
            parts.append(_part(f"REFERENCE ANSWER {number}", dialogue.references[number - 1]))
        parts.append(_part(f"ANSWER {number}", answer))
    task = _TASK.format(what=what, reference=_REFERENCE if has_reference else "")
    return [{"role": "system", "content": task}, {"role": "user", "content": "\n\n".join(parts)}]


def _part(title: str, text: str) -> str:
    return f"=== {title} ===\n{text}\n=== END OF {title} ==="


def judge_dialogues(
    judge: Judge | None, dialogues: list[Dialogue], answers: Answers, tell: Callable[[int], None]
) -> Answers | None:
    """Rates every answer that has no rating yet; None without a judge.

    Raises:
        S2FTError: if the judge cannot be used, or is down; ratings that it gave are kept.
    """
    if judge is None:
        return None
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", judge.model)
    ratings = Answers(
        answers.path.with_suffix(f".{name}.jsonl"), {"judge": judge.model, "words": digest([_TASK, _REFERENCE])}
    )
    silent = 0  # in a row
    for dialogue in dialogues:
        for turn in TURNS:
            row = _rate(judge, dialogue, turn, answers, ratings)
            if row is not None:  # it was asked
                silent = silent + 1 if row.get("down") else 0
            tell(1)
            if silent == GIVE_UP:
                raise S2FTError(
                    f"judge_url={judge.url!r} left {GIVE_UP} answers in a row unrated: {row and row['error']}; all answers "
                    "are kept: run the same command again once it is up"
                )
    return ratings


def _rate(judge: Judge, dialogue: Dialogue, turn: int, answers: Answers, ratings: Answers) -> Row | None:
    """Rates an answer unless that is done, or there is none."""
    name, texts = turn_id(dialogue, turn), earlier(dialogue, turn + 1, answers)
    if texts is None:
        return None
    messages = judge_messages(dialogue, texts)
    key = digest(messages)
    if name in ratings.done and ratings.rows[name]["prompt"] == key:
        return None
    row: Row = {"id": name, "category": dialogue.category, "turn": turn, "prompt": key, "rating": None, "error": None}
    try:
        row["rating"], row["said"] = judge.rate(messages)
    except NoRating as error:
        row |= {"error": str(error), "down": isinstance(error, JudgeDown)}
    ratings.add([row])
    return row


def tally_ratings(dialogues: list[Dialogue], answers: Answers, ratings: Answers | None) -> Iterator[dict[str, Any]]:
    """A row for each turn, each category, and all; the mean of the questions' means, with its normal 95% interval."""
    categories = dict.fromkeys(dialogue.category for dialogue in dialogues)
    yield _ratings_row("all", dialogues, TURNS, answers, ratings)
    for turn in TURNS:
        yield _ratings_row(f"turn {turn}", dialogues, (turn,), answers, ratings)
    for category in categories:
        yield _ratings_row(
            category, [dialogue for dialogue in dialogues if dialogue.category == category], TURNS, answers, ratings
        )


def _ratings_row(
    part: str, dialogues: list[Dialogue], turns: tuple[int, ...], answers: Answers, ratings: Answers | None
) -> dict[str, Any]:
    names = [[turn_id(dialogue, turn) for turn in turns] for dialogue in dialogues]
    flat = [name for group in names for name in group]
    written = [name for name in flat if name in answers.done]
    rated = {} if ratings is None else {name: ratings.rows[name]["rating"] for name in written if name in ratings.done}
    failed = 0 if ratings is None else sum(name in ratings.rows and name not in ratings.done for name in written)
    means = [sum(found) / len(found) for group in names if (found := [rated[name] for name in group if name in rated])]
    interval = mean_interval(means)
    return {
        "task": "mt-bench",
        "part": part,
        "asked": len(flat),
        "answered": len(written),
        "truncated": sum(answers.rows[name]["truncated"] for name in written),
        "rated": len(rated),
        "errors": failed + len(flat) - len(written),
        "rating": sum(means) / len(means) if means else None,
        "low": interval[1] if interval else None,
        "high": interval[2] if interval else None,
    }
