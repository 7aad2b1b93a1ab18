"""MT-Bench's answers, rated by a judge, one turn at a time; a step of its own, so that answers outlive a failing judge.

    question, answer (and reference)  →  explanation, Rating: [[n]]        kept in mt-bench.JUDGE.jsonl beside the answers

A rating belongs to the text that it was given for: an answer that was written anew is rated anew.

Single-answer grading as in Zheng et al., 2023 (https://arxiv.org/abs/2306.05685), asked for in our own words, so ratings
are comparable among runs of one judge here, and only roughly with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from s2ft.common.errors import S2FTError
from s2ft.evaluate.answers import Answers, Row
from s2ft.evaluate.judge import HIGHEST, LOWEST, Judge, JudgeDown, NoRating
from s2ft.evaluate.mt_bench import NEED_REFERENCE, TURNS, Dialogue, earlier, turn_id
from s2ft.evaluate.questions import digest
from s2ft.evaluate.tally import mean_interval

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
    """Has every answer rated that has no rating yet; None without a judge.

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
            silent = silent + 1 if row is not None and row.get("down") else 0
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
    yield _row("all", dialogues, TURNS, answers, ratings)
    for turn in TURNS:
        yield _row(f"turn {turn}", dialogues, (turn,), answers, ratings)
    for category in categories:
        yield _row(
            category, [dialogue for dialogue in dialogues if dialogue.category == category], TURNS, answers, ratings
        )


def _row(
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
