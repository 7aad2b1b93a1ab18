"""What the studies on a real model train on and ask.

    arithmetic    LLM-Adapters' math_data.json, worked problems    asked: six of its tests
    commonsense   LLM-Adapters' train.json files                   asked: three of these tasks and two others
    style         the lighthouse's log (`demo/lighthouse.py`), as chat

Every example is on one side by a hash of its prompt: `fit` is trained on, rates are tuned on `validation`, and the reported
loss is that of `test`. Of the tests, only questions are asked that are no example of either suite: four fifths of the
arithmetic ones are worked problems as well.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any

from datasets import Dataset

from s2ft.common.errors import S2FTError, raise_together
from s2ft.data.examples import data_digest, load_examples
from s2ft.data.folder import find_file, places
from s2ft.demo.lighthouse import conversations
from s2ft.demo.real import documentation
from s2ft.demo.skills import Split, belongs
from s2ft.evaluate.comparison import Checked, check_scores
from s2ft.evaluate.likelihood import load_choices
from s2ft.evaluate.questions import digest, prompt_text
from s2ft.evaluate.tasks import TASKS as QUESTIONS
from s2ft.lab.study.commonsense import ASKED, LONGEST, TRAINED, example_length, training_file

Example = dict[str, Any]  # prompt and completion: text, or messages

ARITHMETIC = "math_data.json"
TESTS = {
    "arithmetic": ("multiarith", "addsub", "svamp", "mawps", "gsm8k", "aqua"),
    "commonsense": tuple(task for tasks in ASKED.values() for task in tasks),
}
_EVERY = 10_000  # conversations: more than there are


def load_task(task: str, data: str | None) -> list[Example]:
    """All examples of a task.

    Args:
        task: One of `TASKS`.
        data: LLM-Adapters' folder; not needed for `style`.

    Raises:
        S2FTError: if a file is missing or malformed.
    """
    return TASKS[task](data or "")


@cache
def examples_digest(task: str, data: str | None) -> str:
    """Of all examples of a task: runs on others are other runs."""
    return data_digest(Dataset.from_list(load_task(task, data)))[:16]


@cache
def unseen_questions(suite: str, data: str) -> Checked:
    """The tests of a suite, without the questions that some training could have read.

    Raises:
        S2FTError: if a file is missing or malformed, or a test holds no other question.
    """
    seen = {_words(_prompt(example)) for task in TESTS for example in load_task(task, data)}
    unseen = [
        (task, [one for one in questions if _words(prompt_text(one.prompt)) not in seen])
        for task, questions in check_scores(TESTS[suite], data).questions
    ]
    raise_together(
        f"data={data!r}: every question of {task.name} is trained on" for task, questions in unseen if not questions
    )
    return Checked(unseen)


@cache
def questions_digest(suite: str, data: str) -> str:
    """Of all questions of a suite that a real model may be asked in writing."""
    asked = [one for _, questions in unseen_questions(suite, data).questions for one in questions]
    return digest([(one.prompt, one.gold) for one in asked])


@cache
def knowledge_digest(data: str) -> str:
    """Of what tells what a model knows besides: questions whose answers are chosen by likelihood, and plain text."""
    choices = [(task, load_choices(QUESTIONS[task], data)) for task in TESTS["commonsense"]]
    return digest([[(task, [asdict(one) for one in found]) for task, found in choices], documentation()])


def draw(examples: list[Example], split: Split, count: int, seed: int) -> list[Example]:
    """So many examples of one side, or all that there are; another seed draws others."""
    side = [example for example in examples if belongs(_prompt(example), split)]
    return random.Random(f"{split}/{seed}").sample(side, min(count, len(side)))


def _words(prompt: str) -> str:
    """What makes two prompts the same, however they are spaced: a test may write "2041" and " ?" for "2,041" and "?"."""
    return re.sub(r"[^a-z0-9]", "", prompt.lower())


def _prompt(example: Example) -> str:
    prompt = example["prompt"]
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _arithmetic(data: str) -> list[Example]:
    names = places(f"ft-training_set/{ARITHMETIC}")
    file = find_file(data, names)
    if file is None:
        raise S2FTError(f"data={data!r} has no worked problems: there is no {names[-1]}")
    return list(load_examples(str(file)))


def _commonsense(data: str) -> list[Example]:
    files = [training_file(task, data) for task in TRAINED]
    raise_together([file for file in files if isinstance(file, str)])
    examples: list[Any] = list(load_examples([str(file) for file in files]))
    return [example for example in examples if example["completion"].strip() and example_length(example) <= LONGEST]


def _style(data: str) -> list[Example]:
    chats = [record["messages"] for record in conversations(_EVERY, seed=0)]
    return [{"prompt": chat[:1], "completion": chat[1:]} for chat in chats]


TASKS: dict[str, Callable[[str], list[Example]]] = {
    "arithmetic": _arithmetic,
    "commonsense": _commonsense,
    "style": _style,
}
