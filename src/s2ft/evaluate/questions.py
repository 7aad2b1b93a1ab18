"""The questions of a task, from files and the Hub, in the words that they are asked in (`data/prompts.py`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from s2ft.common.errors import S2FTError, raise_by_place
from s2ft.data.prompts import alpaca_example
from s2ft.data.records import Record, read_records
from s2ft.data.sources import check_hub_name
from s2ft.evaluate.tasks import Task, data_places, find_data, missing

Message = dict[str, str]  # {"role", "content"}
Prompt = str | list[Message]  # text, or a conversation for the model's chat template


@dataclass(frozen=True)
class Question:
    """What is asked, and the right answer."""

    id: str
    prompt: Prompt
    gold: str


def load_questions(task: Task, data: str, limit: int | None = None, prompts: str = "alpaca") -> list[Question]:
    """The questions of a task that has a rule.

    Args:
        task: Any but MT-Bench.
        data: A folder with NAME/test.json or dataset/NAME/test.json; or a data set on the Hub that is laid out like that.
        limit: Use only the first N questions.
        prompts: "alpaca", the words of training; or "chat", the instruction through the model's chat template.

    Raises:
        S2FTError: if there is no such file, or a record lacks an instruction or an answer that the task's rule can read.
    """
    records = list(islice(_records(task, data), limit))
    raise_by_place((record.place, problem) for record in records if (problem := _problem(record.value, task)))
    return [_question(str(number), record.value, task, prompts) for number, record in enumerate(records)]


def prompt_text(prompt: Prompt) -> str:
    """A prompt for people to read.

    Example:
        >>> prompt_text([{"role": "user", "content": "1+1?"}])
        '1+1?'
    """
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)


def digest(value: Any) -> str:
    """16 hex digits of a hash of `value`.

    Example:
        >>> digest(["a", 1])
        '2657442bb4a48d62'
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _records(task: Task, data: str) -> Iterator[Record]:
    if Path(data).is_dir() or missing([task], data):
        return read_records(find_data(task, data))
    return _from_hub(task, data)


def _from_hub(task: Task, name: str) -> Iterator[Record]:
    from datasets import load_dataset

    check_hub_name(name)
    errors = []
    for place in data_places(task)[1:]:
        try:
            rows = load_dataset(name, data_files={"test": place}, split="test")
        except Exception as error:  # many kinds, from HTTP errors to ValueError
            errors.append(error)
        else:
            return (Record(f"{name}/{place}, row {number}", row) for number, row in enumerate(rows, start=1))
    files = " or ".join(data_places(task)[1:])
    raise S2FTError(f"data={name!r} is no folder here, and {files} could not be loaded from the Hub: {errors[0]}")


def _problem(record: Any, task: Task) -> str | None:
    """What is wrong with a record; None if it is a question."""
    assert task.rule is not None
    if not isinstance(record, dict) or not isinstance(record.get("instruction"), str):
        return "expected an object with instruction (text) and answer"
    if not isinstance(record.get("input") or "", str):
        return f"input={record['input']!r} must be text"
    if task.rule.gold(record.get("answer")) is None:
        return f"answer={record.get('answer')!r} must be {task.rule.wanted} ({task.name})"
    return None


def _question(name: str, record: dict[str, Any], task: Task, prompts: str) -> Question:
    assert task.rule is not None
    gold = task.rule.gold(record["answer"])
    assert gold is not None  # checked above
    if prompts == "alpaca":
        return Question(name, alpaca_example({"output": "", **record})["prompt"], gold)
    content = "\n\n".join(filter(None, (record["instruction"], (record.get("input") or "").strip())))
    return Question(name, [{"role": "user", "content": content}], gold)
