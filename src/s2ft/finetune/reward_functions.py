"""Functions that reward a model's answers: `FILE.py:function`, your own code, which runs because you name it.

    def short(prompts, completions, answer, **kwargs):
        return [float(answer in text) - len(text) / 1000 for text in completions]

A function gets the prompts, the answers (text, or messages where prompts are messages) and each other field of the data, as
lists with an element for each answer, and returns a number for each, or None where it has nothing to say. Only files on this
machine are read, and before anything runs, their text is searched for the function.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from s2ft.common.errors import S2FTError, first_line

Rewards = Callable[..., list[float | None]]


def check_reward(name: str) -> None:
    """Raises `S2FTError` if there is no such file, or it defines no such function; nothing of it is run.

    Example:
        >>> check_reward("rewards.py")
        Traceback (most recent call last):
            ...
        s2ft.common.errors.S2FTError: reward_function='rewards.py' must be FILE.py:function
    """
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not function.isidentifier():
        raise S2FTError(f"reward_function={name!r} must be FILE.py:function")
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise S2FTError(f"reward_function={name!r}: {path} cannot be read: {first_line(error)}") from None
    known = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if function not in known:
        raise S2FTError(
            f"reward_function={name!r}: {path} defines no function {function}; it has {', '.join(known) or 'none'}"
        )


def rewards_digest(names: Sequence[str] | None) -> str | None:
    """SHA-256 over the files that hold the functions; None without any."""
    if not names:
        return None
    return hashlib.sha256(b"".join(Path(name.rpartition(":")[0]).read_bytes() for name in names)).hexdigest()


def load_reward(name: str) -> Rewards:
    """Runs the file, and returns the function; what it returns is checked each time.

    Raises:
        S2FTError: as `check_reward`, or if the file cannot be run.
    """
    check_reward(name)
    path, _, function = name.rpartition(":")
    spec = spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is a program: it raises what it likes
        raise S2FTError(f"reward_function={name!r}: {path} cannot be run: {first_line(error)}") from error
    found = getattr(module, function)
    asked = inspect.signature(found).parameters.get("completion")
    if asked is not None and asked.default is asked.empty:
        raise S2FTError(
            f"reward_function={name!r} wants the field completion, which TRL keeps for itself; call it otherwise: "
            "map='answer=completion'"
        )
    return _checked(name, found)


def _checked(name: str, function: Callable[..., Any]) -> Rewards:
    @wraps(function)
    def rewards(prompts: Sequence[Any], completions: Sequence[Any], **fields: Any) -> list[float | None]:
        try:
            found = function(prompts=prompts, completions=completions, **fields)
        except Exception as error:
            raise S2FTError(f"reward_function={name!r} raised {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(found, Sequence) or len(found) != len(completions) or not all(map(_is_reward, found)):
            raise S2FTError(
                f"reward_function={name!r} returned {str(found)[:60]}; it must return {len(completions)} numbers"
            )
        return list(found)

    return rewards


def _is_reward(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and math.isfinite(value))
