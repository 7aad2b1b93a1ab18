"""Checks that the files and folders exist that a run's options name, before any work.

Names on the Hub are not checked: that takes a connection, and happens on loading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from s2ft.common.errors import gathered, raise_together
from s2ft.data.sources import check_source
from s2ft.evaluate.tasks import find_tasks, missing
from s2ft.finetune.reward_functions import check_reward
from s2ft.runtime.lookup import check_folder


def input_problems(values: Mapping[str, Any]) -> list[str]:
    """A problem for each input that does not exist; values of a wrong type are reported elsewhere.

    Example:
        >>> input_problems({"model": "org/base", "data": ["some/set", "no.json"], "epochs": "many"})
        ["data='no.json': there is no such file"]
    """
    model, tasks, questions = (values.get(name) for name in ("model", "evaluate", "eval_data"))
    checks: list[Callable[[], object]] = [partial(check_source, name) for name in _texts(values.get("data"))]
    checks += [partial(check_folder, name) for name in _texts(model)]
    checks += [partial(check_reward, name) for name in _texts(values.get("reward_function"))]
    if isinstance(questions, str) and _texts(tasks):
        names = [word for text in _texts(tasks) for word in text.split(",")]
        checks.append(lambda: raise_together(missing(find_tasks(names), questions)))
    return gathered(*checks)


def _texts(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [text for text in values if isinstance(text, str) and text.strip()]
