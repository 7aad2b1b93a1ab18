"""MT-Bench: 80 questions of 8 categories, each with a second one that builds on the answer to the first.

    question 1 → answer 1 → question 2 → answer 2        written by the model, here
                                                         rated by a judge, in `judge.py`

Questions lie in FOLDER/mt_bench/question.jsonl or FOLDER/question.jsonl (`question_id`, `category`, `turns`), reference answers
in `reference_answer/*.jsonl` beside it. A data set on the Hub may hold both, as HuggingFaceH4/mt_bench_prompts does.

Source: Zheng et al., Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena, 2023 (https://arxiv.org/abs/2306.05685).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from s2ft.common.errors import raise_by_place, raise_together
from s2ft.data.prompts import alpaca_conversation
from s2ft.data.records import read_records
from s2ft.evaluate.answers import Answers, write_answers
from s2ft.evaluate.engines import Engine
from s2ft.evaluate.questions import Prompt, digest
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
