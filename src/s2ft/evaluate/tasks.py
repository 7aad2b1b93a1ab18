"""The tasks that a model is evaluated on: one table.

    commonsense   boolq piqa siqa hellaswag winogrande arc-e arc-c obqa     up to  32 new tokens, 4 beams
    arithmetic    multiarith gsm8k addsub aqua singleeq svamp mawps         up to 256 new tokens, 4 beams
    instruction   mt-bench                                                  up to 1024 new tokens, greedy; needs a judge

The first two are those of LLM-Adapters: records with `instruction`, maybe `input`, and `answer`, in dataset/NAME/test.json.

A new task is a row of `TASKS`, a new suite a row of `DECODING` too, a new way to read answers a `Rule` in `extraction.py`:
`s2ft eval`, `s2ft train --evaluate` and their help know it from then on.

Source: Hu et al., LLM-Adapters, 2023 (https://arxiv.org/abs/2304.01933); the numbers of questions are its test sets'.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from s2ft.common.errors import raise_together
from s2ft.data.folder import find_file, places
from s2ft.evaluate.extraction import FirstLetter, LastNumber, Rule, StatedLetter, Words, numbered


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
    size: int  # of the published test set, to compare with; other sizes are allowed
    rule: Rule | None  # None: a judge rates the answers
    strict: Rule | None = None  # a second reading, reported beside the first


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


def missing(tasks: Sequence[Task], data: str) -> list[str]:
    """A problem for each task without data in the folder `data`; none where `data` is no folder."""
    if not Path(data).is_dir():
        return [f"data={data!r}: there is no such folder"] if data.startswith((".", "/", "~")) else []
    return [
        f"data={data!r} has nothing on {task.name}: there is no {data_places(task)[-1]}"
        for task in tasks
        if find_file(data, data_places(task)) is None
    ]


def data_places(task: Task) -> tuple[str, ...]:
    """Where a task's questions may lie in a data folder; the last one is where they belong."""
    if task.rule is None:
        return f"{task.folder}/question.jsonl", "question.jsonl"
    return places(f"dataset/{task.folder}/test.json")


def find_data(task: Task, data: str) -> str:
    """The file of a task in the folder `data`.

    Raises:
        S2FTError: if there is none.
    """
    raise_together(missing([task], data))
    return str(find_file(data, data_places(task)))
