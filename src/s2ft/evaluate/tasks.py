"""The tasks that a model is judged by, and where their questions come from.

    commonsense   boolq piqa siqa hellaswag winogrande arc-e arc-c obqa     up to  32 new tokens, 4 beams
    arithmetic    multiarith gsm8k addsub aqua singleeq svamp mawps         up to 256 new tokens, 4 beams
    instruction   mt-bench                                                  up to 1024 new tokens, greedy; needs a judge

The first two are those of LLM-Adapters: records with `instruction`, maybe `input`, and `answer`, in dataset/NAME/test.json. A
question is asked in the words of training (`prompts.py`).

Source: Hu et al., LLM-Adapters, 2023 (https://arxiv.org/abs/2304.01933); the numbers of questions are its test sets'.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from s2ft.common.errors import S2FTError, raise_by_place, raise_together
from s2ft.data.folder import find_file, places
from s2ft.data.prompts import alpaca_example
from s2ft.data.records import Record, check_hub_name, read_records
from s2ft.evaluate.extraction import FirstLetter, LastNumber, Rule, StatedLetter, Words, numbered

Message = dict[str, str]  # {"role", "content"}
Prompt = str | list[Message]  # text, or a conversation for the model's chat template

PROMPTS = ("alpaca", "chat")
AUTO = "auto"  # the words that an adapter was trained on


@dataclass(frozen=True)
class Decoding:
    """How an answer is written: beams without sampling (one beam is greedy), and the most tokens it may have."""

    beams: int
    max_new_tokens: int


DECODING = {"commonsense": Decoding(4, 32), "arithmetic": Decoding(4, 256), "instruction": Decoding(1, 1024)}
SUITES = tuple(DECODING)


@dataclass(frozen=True)
class Task:
    """A task: its name and suite, the folder of its data, the size of its test set, and how an answer is read."""

    name: str
    suite: str
    folder: str
    size: int  # a fact to compare with, never a condition
    rule: Rule | None  # None: a judge rates the answers
    strict: Rule | None = None  # a second reading, reported beside the first


@dataclass(frozen=True)
class Question:
    """What is asked, and the right answer."""

    id: str
    prompt: Prompt
    gold: str


_ANSWERS, _NUMBERS = numbered("answer", 5), LastNumber()
TASKS = {
    task.name: task
    for task in (
        Task("boolq", "commonsense", "boolq", 3270, Words("true", "false")),
        Task("piqa", "commonsense", "piqa", 1838, numbered("solution", 2)),
        Task("siqa", "commonsense", "social_i_qa", 1954, _ANSWERS),
        Task("hellaswag", "commonsense", "hellaswag", 10042, numbered("ending", 4)),
        Task("winogrande", "commonsense", "winogrande", 1267, numbered("option", 2)),
        Task("arc-e", "commonsense", "ARC-Easy", 2376, _ANSWERS),
        Task("arc-c", "commonsense", "ARC-Challenge", 1172, _ANSWERS),
        Task("obqa", "commonsense", "openbookqa", 500, _ANSWERS),
        Task("multiarith", "arithmetic", "MultiArith", 600, _NUMBERS),
        Task("gsm8k", "arithmetic", "gsm8k", 1319, _NUMBERS),
        Task("addsub", "arithmetic", "AddSub", 395, _NUMBERS),
        Task("aqua", "arithmetic", "AQuA", 254, FirstLetter(), StatedLetter()),
        Task("singleeq", "arithmetic", "SingleEq", 508, _NUMBERS),
        Task("svamp", "arithmetic", "SVAMP", 1000, _NUMBERS),
        Task("mawps", "arithmetic", "mawps", 238, _NUMBERS),
        Task("mt-bench", "instruction", "mt_bench", 80, None),
    )
}


def find_tasks(names: Iterable[str]) -> list[Task]:
    """The tasks of suites and task names, each once, in the order of `TASKS`. A task may go by its data's folder too.

    Raises:
        S2FTError: for each unknown name, with the nearest ones.

    Example:
        >>> [task.name for task in find_tasks(["gsm8k", "instruction", "ARC-Easy"])]
        ['arc-e', 'gsm8k', 'mt-bench']
        >>> find_tasks(["gsm9k"])
        Traceback (most recent call last):
            ...
        s2ft.common.errors.S2FTError: task='gsm9k' is unknown; did you mean gsm8k?
    """
    by_name = {name.lower(): {task.name} for task in TASKS.values() for name in (task.name, task.folder)}
    by_name |= {suite: {task.name for task in TASKS.values() if task.suite == suite} for suite in SUITES}
    wanted, problems = set[str](), []
    for name in names:
        found = by_name.get(name.strip().lower())
        wanted |= found or set()
        problems += [] if found else [_unknown(name)]
    raise_together(problems)
    return [task for task in TASKS.values() if task.name in wanted]


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), [*TASKS, *SUITES], n=3)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(TASKS)}; suites: {', '.join(SUITES)}"
    )
    return f"task={name!r} is unknown; {hint}"


def load_questions(task: Task, data: str, limit: int | None = None, prompts: str = "alpaca") -> list[Question]:
    """The questions of a task that has a rule.

    Args:
        task: Any but MT-Bench.
        data: A folder with NAME/test.json or dataset/NAME/test.json; or a data set on the Hub that is laid out like that.
        limit: The first so many.
        prompts: "alpaca", the words of training; or "chat", the instruction through the model's chat template.

    Raises:
        S2FTError: if there is no such file, or a record lacks an instruction or an answer that the task's rule can read.
    """
    records = list(islice(_records(task, data), limit))
    raise_by_place((record.place, problem) for record in records if (problem := _problem(record.value, task)))
    return [_question(str(number), record.value, task, prompts) for number, record in enumerate(records)]


def missing(tasks: Sequence[Task], data: str) -> list[str]:
    """A problem for each task without data in the folder `data`; none where `data` is no folder."""
    if not Path(data).is_dir():
        return [f"data={data!r}: there is no such folder"] if data.startswith((".", "/", "~")) else []
    return [
        f"data={data!r} has nothing on {task.name}: there is no {_places(task)[-1]}"
        for task in tasks
        if find_file(data, _places(task)) is None
    ]


def digest(value: Any) -> str:
    """16 hex digits that tell values apart.

    Example:
        >>> digest(["a", 1])
        '2657442bb4a48d62'
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _places(task: Task) -> tuple[str, ...]:
    """Where a task's questions may lie; the last one is where they belong."""
    if task.rule is None:
        return f"{task.folder}/question.jsonl", "question.jsonl"
    return places(f"dataset/{task.folder}/test.json")


def find_data(task: Task, data: str) -> str:
    """The file of a task in the folder `data`.

    Raises:
        S2FTError: if there is none.
    """
    raise_together(missing([task], data))
    return str(find_file(data, _places(task)))


def _records(task: Task, data: str) -> Iterator[Record]:
    if Path(data).is_dir() or missing([task], data):
        return read_records(find_data(task, data))
    return _from_hub(task, data)


def _from_hub(task: Task, name: str) -> Iterator[Record]:
    from datasets import load_dataset

    check_hub_name(name)
    errors = []
    for place in _places(task)[1:]:
        try:
            rows = load_dataset(name, data_files={"test": place}, split="test")
        except Exception as error:  # the library raises a dozen kinds here, from HTTP errors to plain ValueErrors
            errors.append(error)
        else:
            return (Record(f"{name}/{place}, row {number}", row) for number, row in enumerate(rows, start=1))
    raise S2FTError(
        f"data={name!r} is no folder here, and {' or '.join(_places(task)[1:])} could not be loaded from the Hub: {errors[0]}"
    )


def _problem(record: Any, task: Task) -> str | None:
    """What keeps a record from being a question; None if nothing does."""
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
