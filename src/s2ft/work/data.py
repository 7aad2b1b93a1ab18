"""Training data: files, folders and Hub data sets, brought to one form.

    Alpaca             {"instruction", "input"?, "output"}         ┐
    prompt/completion  {"prompt", "completion"}, text or messages  ├─→  {"prompt", "completion"}  ─→  loss on the completion
    chat               {"messages": [{"role", "content"}, ...]}    ┘

A conversation becomes one example for each turn of the assistant, with all that was said before as its prompt. So the loss
falls on every response and on nothing else, under any chat template: templates that mark the assistant's tokens are rare, and
some render a turn differently once another follows it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset

from s2ft.errors import raise_together
from s2ft.work.prompts import alpaca_example
from s2ft.work.records import Record, read_records

Example = dict[str, Any]  # {"prompt", "completion"}: both text, or both lists of messages

LAYOUTS = "instruction, output (and input); or prompt, completion; or messages"
_SHOWN = 10  # problems listed at once
_SURROGATE = re.compile("[\ud800-\udfff]")


def load_examples(source: str | Sequence[str], limit: int | None = None) -> Dataset:
    """The examples of one or several sources, in order, as columns `prompt` and `completion`.

    Args:
        source: A `.json` (array of objects), `.jsonl` or `.parquet` file, a folder of them, or the name of a data set on
            the Hub (its split `train`). Several sources are joined. In a folder that has files named `train*`, only those
            are read.
        limit: At most so many examples, the first ones.

    Raises:
        S2FTError: with file and line, if a source is missing, empty or malformed, or records lack fields (up to ten at once).
    """
    sources = [source] if isinstance(source, str) else list(source)
    raise_together([] if sources else ["data is empty; name a file, a folder or a data set on the Hub"])
    examples: list[Example] = []
    for name in sources:
        examples += _load(name, None if limit is None else limit - len(examples))
    _check_one_kind(examples, sources)
    return Dataset.from_list(examples)


def is_chat(dataset: Dataset) -> bool:
    """Whether the examples are messages rather than text."""
    return not isinstance(dataset[0]["prompt"], str)


def data_digest(dataset: Dataset) -> str:
    """SHA-256 over the examples in their order, as 64 hex digits: the same for the same text from another file or layout.

    Example:
        >>> data_digest(Dataset.from_list([{"prompt": "1+1=", "completion": "2"}]))[:8]
        'a49261f9'
    """
    digest = hashlib.sha256()
    for example in dataset:
        digest.update(
            json.dumps([example["prompt"], example["completion"]], sort_keys=True, ensure_ascii=False).encode()
        )
        digest.update(b"\n")
    return digest.hexdigest()


def _load(source: str, limit: int | None) -> list[Example]:
    problems: list[str] = []
    examples = _examples(read_records(source), problems)
    found = list(examples if limit is None else islice(examples, max(0, limit)))
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"... and {len(problems) - _SHOWN} more"]
    raise_together(problems)
    return found


def _examples(records: Iterable[Record], problems: list[str]) -> Iterator[Example]:
    for record in records:
        found = list(_record_problems(record.value))
        problems += [f"{record.place}: {problem}" for problem in found]
        if not found:
            yield from _convert(record.value)


def _record_problems(value: Any) -> Iterator[str]:
    """What keeps a record from being an example: nothing, if it is one."""
    if not isinstance(value, dict):
        yield f"expected an object with {LAYOUTS}; found {_shown(value)}"
    elif "messages" in value:
        yield from _conversation_problems(value["messages"])
    elif {"prompt", "completion"} <= value.keys():
        yield from _pair_problems(value["prompt"], value["completion"])
    elif {"instruction", "output"} <= value.keys():
        optional = {} if value.get("input") is None else {"input": value["input"]}
        yield from _text_problems({"instruction": value["instruction"], **optional, "output": value["output"]})
    else:
        yield f"expected the fields {LAYOUTS}; found {', '.join(map(str, value)) or 'none'}"


def _conversation_problems(messages: Any) -> Iterator[str]:
    problems = list(_message_problems("messages", messages))
    yield from problems
    if problems or _assistant_turns(messages):
        return
    if messages[0]["role"] == "assistant":
        yield "messages only opens with a turn of the role 'assistant', which answers nothing; it needs one after a prompt"
    else:
        yield "messages has no turn with the role 'assistant', so there is nothing to learn"


def _pair_problems(prompt: Any, completion: Any) -> Iterator[str]:
    if isinstance(prompt, str) or isinstance(completion, str):
        yield from _text_problems({"prompt": prompt, "completion": completion})
        return
    yield from _message_problems("prompt", prompt)
    yield from _message_problems("completion", completion)


def _text_problems(fields: dict[str, Any]) -> Iterator[str]:
    for name, text in fields.items():
        if not isinstance(text, str):
            yield f"{name} is {_shown(text)}; it must be text"
        elif _is_broken(text):
            yield f"{name} is {_shown(text)}; it holds half of a surrogate pair, which is no text"


def _is_broken(text: str) -> bool:
    """JSON may escape half a character, as in "\\ud83d"; no encoding can write it."""
    return _SURROGATE.search(text) is not None


def _message_problems(field: str, messages: Any) -> Iterator[str]:
    if not isinstance(messages, list) or not messages:
        yield f"{field} is {_shown(messages)}; it must be a list of messages with role and content"
        return
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            yield f"{field}[{index}] is {_shown(message)}; a message has role and content, both text"
        elif _is_broken(content + message["role"]):
            yield f"{field}[{index}] is {_shown(message)}; it holds half of a surrogate pair, which is no text"


def _convert(value: dict[str, Any]) -> Iterator[Example]:
    if "messages" in value:
        messages = _plain(value["messages"])
        for turn in _assistant_turns(messages):
            yield {"prompt": messages[:turn], "completion": messages[turn : turn + 1]}
    elif "prompt" not in value:
        yield alpaca_example(value)
    elif isinstance(value["prompt"], str):
        yield {"prompt": value["prompt"], "completion": value["completion"]}
    else:
        yield {"prompt": _plain(value["prompt"]), "completion": _plain(value["completion"])}


def _assistant_turns(messages: Any) -> list[int]:
    turns = enumerate(messages) if isinstance(messages, list) else ()
    return [index for index, turn in turns if isinstance(turn, dict) and turn.get("role") == "assistant" and index > 0]


def _plain(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _check_one_kind(examples: list[Example], sources: list[str]) -> None:
    kinds = {type(example["prompt"]) for example in examples}
    names = ", ".join(repr(source) for source in sources)
    raise_together([f"data={names} holds no example"] if not kinds else [])
    raise_together([f"data={names} mixes text and chat messages; train on one kind"] if len(kinds) > 1 else [])


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:  # nested almost as deeply as could be read
        text = f"a deeply nested {type(value).__name__}"
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "..."
