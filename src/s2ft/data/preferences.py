"""Records of the objectives beside supervised fine-tuning: two answers to compare, an answer that was judged, a prompt alone.

    pair      {"prompt", "chosen", "rejected"}       two examples: the better answer, then the worse one
    judged    {"prompt", "completion", "label"}      one example with its label, true for a good answer; a pair becomes two
    prompt    {"prompt", ...}                        one example without an answer; what stands beside the prompt is for rewards

Prompts and answers are text, or lists of chat messages; `instruction` and `input` become the Alpaca prompt. A pair whose prompt
stands at the beginning of both answers, as in many data sets, is parted where they part; texts with a field beside them that
sounds like their prompt are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any

from s2ft.data.chat import KWARGS, LEARNED, OPTIONS, Example, is_chat_record, messages_problems, shown, to_json
from s2ft.data.chat import whole_example as chat_example
from s2ft.data.examples import ANSWERS, Kind, answer_problems
from s2ft.data.prompts import alpaca_prompt

Value = dict[str, Any]

_ANSWERS = ("chosen", "rejected")
_PROMPTS = "prompt (or instruction and input)"
_LIKE_PROMPTS = ("question", "query", "problem", "input", "context", "user")  # what other data sets call a prompt
_BESIDE = (*OPTIONS, KWARGS, "system")  # goes to the chat template, with each answer


_TAKEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def pair_problems(value: Any) -> Iterator[str]:
    """Reasons why a record is no pair of answers; none if it is."""
    if not _has(value, _ANSWERS):
        yield f"expected an object with {_PROMPTS}, chosen and rejected; found {_found(value)}"
        return
    if not _prompt(value) and isinstance(value["chosen"], str):
        like = [name for name in _LIKE_PROMPTS if isinstance(value.get(name), str)]
        yield from (
            f"there is no {_PROMPTS}, but {name}: say that it is the prompt (--map prompt={name}), or leave it out"
            for name in like
        )
        if like:
            return
    prompt, *answers = _parted(value)
    if not prompt:
        yield "prompt is missing, and chosen and rejected do not begin alike, so there is none to part from them"
        return
    problems = [
        problem for name, answer in zip(_ANSWERS, answers, strict=True) for problem in _of_answer(value, name, answer)
    ]
    yield from dict.fromkeys(problems)


def judged_problems(value: Any) -> Iterator[str]:
    """Reasons why a record is neither a judged answer nor a pair; none if it is."""
    if _has(value, _ANSWERS):
        yield from pair_problems(value)
        return
    if not _has(value, ("completion", "label")) or not _prompt(value):
        yield f"expected an object with {_PROMPTS}, completion and label, or chosen and rejected; found {_found(value)}"
        return
    if value["label"] not in (0, 1):
        yield f"label is {shown(value['label'])}; it must be true (a good answer) or false"
    yield from _of_answer(value, "completion", value["completion"])


def prompt_problems(value: Any) -> Iterator[str]:
    """Reasons why a record holds no prompt to answer; none if it does."""
    if not isinstance(value, dict) or not _prompt(value):
        yield f"expected an object with {_PROMPTS}; found {_found(value)}"
        return
    yield from (
        f"the field {name} cannot be passed to a reward function, since TRL passes something else by that name; rename it (map)"
        for name in _TAKEN
        if name in value
    )
    prompt = _prompt(value)
    if isinstance(prompt, str):
        yield from answer_problems({"prompt": prompt, "completion": ""})
        return
    yield from (problems := list(messages_problems("prompt", prompt)))
    if not problems and prompt[-1]["role"] == LEARNED:
        yield f"prompt ends with a turn of the role {LEARNED!r}, so nothing is asked"
    yield from (
        f"prompt[{index}] has {', '.join(more)}; a prompt that the model answers by itself has role and content alone"
        for index, message in enumerate([] if problems else prompt)
        if (more := sorted(message.keys() - {"role", "content"}))
    )
    yield from (
        f"{name} is {shown(value[name])}; the chat template gets the messages alone here, so write it into the prompt"
        for name in _BESIDE
        if value.get(name)
    )


def _pair_examples(value: Value) -> Iterator[Example]:
    prompt, *answers = _parted(value)
    for answer in answers:
        yield _example(_answered(value, prompt, answer))


def _judged_examples(value: Value) -> Iterator[Example]:
    if _has(value, _ANSWERS):
        for example, label in zip(_pair_examples(value), (True, False), strict=True):
            yield {**example, "label": label}
    else:
        record = _answered(value, _prompt(value), value["completion"])
        yield {**_example(record), "label": bool(value["label"])}


def _prompt_examples(value: Value) -> Iterator[Example]:
    prompt = _prompt(value)
    fields = {name: item for name, item in value.items() if name not in ("prompt", *_BESIDE)}
    yield {"prompt": prompt, "completion": "" if isinstance(prompt, str) else [], "fields": to_json(fields)}


KINDS = {
    "answer": ANSWERS,
    "pair": Kind(pair_problems, _pair_examples, together=2),
    "judged": Kind(judged_problems, _judged_examples),
    "prompt": Kind(prompt_problems, _prompt_examples),
}


def _has(value: Any, names: Iterable[str]) -> bool:
    return isinstance(value, dict) and {*names} <= value.keys()


def _found(value: Any) -> str:
    return (", ".join(map(str, value)) or "no field") if isinstance(value, dict) else shown(value)


def _prompt(value: Value) -> Any:
    """A record's prompt as it stands, or made of its instruction; None without either."""
    if "instruction" not in value or "prompt" in value:
        return value.get("prompt")
    texts = value["instruction"], value.get("input") or ""
    return alpaca_prompt(*texts) if all(isinstance(text, str) for text in texts) else None


def _parted(value: Value) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected of a pair; the prompt may be what both answers begin with."""
    prompt, chosen, rejected = _prompt(value), *([x] if isinstance(x := value[name], dict) else x for name in _ANSWERS)
    if prompt and not (isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list)):
        return prompt, chosen, rejected
    length = _shared(chosen, rejected)
    return (chosen[:length], chosen[length:], rejected[length:]) if length else (None, chosen, rejected)


def _shared(chosen: Any, rejected: Any) -> int:
    """How much of two answers is their common prompt: messages, or characters before a space; never a whole answer."""
    of_chat = isinstance(chosen, list) and isinstance(rejected, list)
    if not of_chat and not (isinstance(chosen, str) and isinstance(rejected, str)):
        return 0
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if of_chat:
        return min(same, len(chosen) - 1, len(rejected) - 1)
    return len(str(chosen[:same]).rpartition(" ")[0].rstrip())


def _of_answer(value: Value, name: str, answer: Any) -> Iterator[str]:
    """What is wrong with one answer (or its prompt), which the message calls by its field."""
    record = _answered(value, _parted(value)[0] if name in _ANSWERS else _prompt(value), answer)
    problems = [problem.replace("completion", name, 1) for problem in answer_problems(record)]
    yield from problems
    if not problems and isinstance(answer, list) and answer[-1]["role"] != LEARNED:
        yield f"{name} ends with a turn of the role {answer[-1]['role']!r}; the last one must be {LEARNED!r}"


def _answered(value: Value, prompt: Any, answer: Any) -> Value:
    """The record with one answer, as supervised fine-tuning reads it."""
    beside = {key: item for key, item in value.items() if key in _BESIDE}
    return {**beside, "prompt": prompt, "completion": [answer] if isinstance(answer, dict) else answer}


def _example(record: Value) -> Example:
    if is_chat_record(record):
        return chat_example(record)
    return {"prompt": record["prompt"], "completion": record["completion"]}
