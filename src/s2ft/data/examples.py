"""Training data: files, folders and Hub data sets, converted to one form.

    Alpaca             {"instruction", "input"?, "output"}         ┐
    prompt/completion  {"prompt", "completion"}, text or messages  ├─→  {"prompt", "completion"}  ─→  loss on the completion
    chat               {"messages": [{"role", "content"}, ...]}    ┘

What else people's records look like, `layouts.py` brings into these.

A conversation becomes one example for each turn of the assistant, with all that was said before as its prompt (`chat.py`). So
the loss falls on every response and on nothing else, under any chat template: templates that mark the assistant's tokens are
rare, and some render a turn differently once another follows it.

Examples of chat keep their place in the source, as a model's template may refuse them later. A table's column has one type, and
tool calls differ in theirs, so what a message holds besides role and content is stored as JSON (`more`), like the template's
`options`.

Objectives beside supervised fine-tuning read records of another `Kind`: `preferences.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

from datasets import Dataset

from s2ft.common.errors import S2FTError, gathered, raise_by_place, raise_together
from s2ft.data.chat import Example, Message, chat_examples, chat_problems, is_broken, is_chat_record, shown, to_json
from s2ft.data.layouts import Reading, check_columns
from s2ft.data.mapped import PIECE, mapped
from s2ft.data.prompts import alpaca_example, is_alpaca
from s2ft.data.records import Record, read_records

LAYOUTS = (
    "instruction, output (and input); or prompt, completion; or messages; or conversations; or question, answer; or text "
    "(and no prompt)"
)
_MAP = "; --map gives columns these names, as in --map instruction=question,output=reply"
_PAIRS = "; chosen and rejected are for another objective: dpo, kto, orpo or reward"
LAYOUT_FIELDS = (
    {"messages"},
    {"prompt", "completion"},
    {"instruction", "output"},
)  # the first that a record has all of
_OF_CHAT = ("system", "history", "tools", "documents", "images")  # fields that a text prompt cannot include


@dataclass(frozen=True)
class Kind:
    """What the records of an objective hold, and the examples that they become."""

    problems: Callable[[Any], Iterator[str]]  # reasons why a record cannot be used; none if it can
    convert: Callable[[dict[str, Any]], Iterable[Example]]
    together: int = 1  # examples that one record becomes, and that stay together; conversations become what they hold


@dataclass(frozen=True)
class Loaded:
    """Examples, and what the records of each source were taken for."""

    examples: Dataset  # columns prompt, completion, and of chat: place and maybe options
    readings: Sequence[Reading]
    counts: Sequence[int]  # examples of each source, in their order

    @property
    def sources(self) -> list[int]:
        """The number of each example's source."""
        return [number for number, count in enumerate(self.counts) for _ in range(count)]


def load_examples(
    source: str | Sequence[str],
    limit: int | None = None,
    kind: Kind | None = None,
    columns: Mapping[str, str] | None = None,
) -> Dataset:
    """The examples of one or several sources, in order, as columns `prompt` and `completion`; arguments as of `load`."""
    return load([source] if isinstance(source, str) else source, limit, kind, columns).examples


def load(
    sources: Sequence[str],
    limit: int | None = None,
    kind: Kind | None = None,
    columns: Mapping[str, str] | None = None,
) -> Loaded:
    """The examples of all sources, joined in order, and what was taken for what.

    Args:
        sources: Files, folders or names on the Hub (`sources.py`, `files.py`). In a folder that has files named `train*`,
            only those are read.
        limit: Use only the first N examples.
        kind: What the records hold; answers to learn, unless given.
        columns: Name that a layout knows → column of the data, where they differ.

    Raises:
        S2FTError: with file and line, if a source is missing, empty or malformed, or records cannot be used.
    """
    kind = kind or ANSWERS
    limit = None if limit is None else limit * kind.together
    raise_together([] if sources else ["data is empty; name a file, a folder or a data set on the Hub"])
    readings = [Reading(name, columns or {}) for name in sources]
    read = _Read(kind, limit)
    table = _table(read.examples(readings))
    raise_by_place(read.problems, [*read.unreadable, *_column_problems(readings, limit)])
    _check_one_kind(read.kinds, list(sources))
    return Loaded(table, readings, read.counts)


class _Read:
    """The examples of all sources, one by one, and what was found on the way."""

    def __init__(self, kind: Kind, limit: int | None) -> None:
        self.kind, self.limit = kind, limit
        self.counts: list[int] = []  # examples of each source
        self.kinds: set[type] = set()  # of prompts
        self.unreadable: list[str] = []
        self.problems: list[tuple[str, str]] = []

    def examples(self, readings: Iterable[Reading]) -> Iterator[Example]:
        """All of the first one's kind of prompt: a table holds no other beside it."""
        for reading in readings:
            left = None if self.limit is None else max(0, self.limit - sum(self.counts))
            self.counts.append(0)
            for example in islice(self._of_source(reading), left):
                self.counts[-1] += 1
                self.kinds.add(type(example["prompt"]))
                if len(self.kinds) == 1:
                    yield example

    def _of_source(self, reading: Reading) -> Iterator[Example]:
        try:
            records = reading.adapted(read_records(reading.source, is_part=self.limit is not None))
            yield from _examples(records, self.kind, self.problems)
        except S2FTError as error:
            self.unreadable += error.problems


def _column_problems(readings: Sequence[Reading], limit: int | None) -> list[str]:
    """Columns of the map that are nowhere; where not all was read, they may be further on."""
    return [] if limit is not None else gathered(partial(check_columns, readings))


def is_chat(dataset: Dataset) -> bool:
    """Whether the examples are messages rather than text."""
    return not isinstance(dataset[0]["prompt"], str)


def prompt_format(dataset: Dataset) -> str:
    """The format of the prompts: "chat", "alpaca", or "text" for the user's own."""
    if is_chat(dataset):
        return "chat"
    return "alpaca" if all(map(is_alpaca, dataset["prompt"])) else "text"


def conversation(example: Example) -> tuple[list[Message], list[Message], dict[str, Any]]:
    """Prompt, completion, and options for the chat template, of an example of chat."""
    options = example.get("options") or {}
    options = json.loads(options) if isinstance(options, str) else options
    return _whole(example["prompt"]), _whole(example["completion"]), options


def data_digest(dataset: Dataset) -> str:
    """SHA-256 over the examples in their order, as 64 hex digits: the same for the same text from another file or layout.

    Example:
        >>> data_digest(Dataset.from_list([{"prompt": "1+1=", "completion": "2"}]))[:8]
        'a49261f9'
    """
    digest = hashlib.sha256()
    for example in dataset:
        judged = [example[name] for name in ("label", "fields") if name in example]
        digest.update(json.dumps([*_told(example), *judged], sort_keys=True, ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _told(example: Example) -> list[Any]:
    """What an example says, however it is stored."""
    if isinstance(example["prompt"], str):
        return [example["prompt"], example["completion"]]
    prompt, completion, options = conversation(example)
    return [prompt, completion, options] if options else [prompt, completion]


def _table(examples: Iterator[Example]) -> Dataset:
    """Every row has every column; few examples are kept in memory, and options of the template where any has some."""
    few = list(islice(examples, PIECE))
    later = next(examples, None)
    if later is not None:
        return mapped(map(_full, chain(few, [later], examples)))
    names = dict.fromkeys(name for example in few for name in example)
    return Dataset.from_list([{name: _stored(name, example.get(name)) for name in names} for example in few])


def _full(example: Example) -> Example:
    """A row of a table whose later rows are not known yet: with all that an example of its kind may have."""
    if isinstance(example["prompt"], str):
        return example
    told = {name: _stored(name, value) for name, value in {"options": {}, **example}.items()}
    messages = {name: [{"more": "{}", **message} for message in told[name]] for name in ("prompt", "completion")}
    return {**told, **messages}


def _stored(name: str, value: Any) -> Any:
    if name == "options":
        return to_json(value or {})
    return [_message(message) for message in value] if isinstance(value, list) else value


def _message(message: Message) -> Message:
    more = {key: item for key, item in message.items() if key not in ("role", "content")}
    plain = {"role": message["role"], "content": message["content"]}
    return {**plain, "more": to_json(more)} if more else plain


def _whole(messages: Sequence[Message]) -> list[Message]:
    return [
        {**{key: item for key, item in message.items() if key != "more"}, **json.loads(message.get("more") or "{}")}
        for message in messages
    ]


def _examples(records: Iterable[Record], kind: Kind, problems: list[tuple[str, str]]) -> Iterator[Example]:
    for record in records:
        found = list(kind.problems(record.value))
        problems += [(record.place, problem) for problem in found]
        for example in [] if found else kind.convert(record.value):
            is_text = isinstance(example["prompt"], str)
            yield example if is_text else {**example, "place": record.place}


def _layout(value: dict[str, Any]) -> set[str] | None:
    """The fields that decide what a record is; others may stand beside them."""
    return next((fields for fields in LAYOUT_FIELDS if fields <= value.keys()), None)


def answer_problems(value: Any) -> Iterator[str]:
    """Reasons why a record cannot become an example; none if it can."""
    if not isinstance(value, dict):
        yield f"expected an object with {LAYOUTS}; found {shown(value)}"
        return
    layout = _layout(value)
    if layout is None:
        hint = _PAIRS if {"chosen", "rejected"} <= value.keys() else _MAP
        yield f"expected the fields {LAYOUTS}; found {', '.join(map(str, value)) or 'none'}{hint}"
    elif "instruction" not in layout and is_chat_record(value):
        yield from chat_problems(value)
    else:
        yield from _text_problems(value, layout)


def _text_problems(value: dict[str, Any], layout: set[str]) -> Iterator[str]:
    names = ("prompt", "completion") if "prompt" in layout else ("instruction", "input", "output")
    for name in names:
        text = value.get(name, "") if name == "input" else value[name]
        if not isinstance(text, str):
            yield f"{name} is {shown(text)}; it must be text"
        elif is_broken(text):
            yield f"{name} is {shown(text)}; it holds half of a surrogate pair, which is not valid text"
    yield from (
        f"{name} is {shown(value[name])}, which a prompt of text has no place for; turn it into messages, or leave it out"
        for name in _OF_CHAT
        if value.get(name)
    )


def _convert(value: dict[str, Any]) -> Iterable[Example]:
    if "instruction" in (_layout(value) or ()):
        return [alpaca_example(value)]
    if is_chat_record(value):
        return chat_examples(value)
    return [{"prompt": value["prompt"], "completion": value["completion"]}]


ANSWERS = Kind(answer_problems, _convert)


def _check_one_kind(kinds: set[type], sources: list[str]) -> None:
    names = ", ".join(repr(source) for source in sources)
    raise_together([f"data={names} holds no example"] if not kinds else [])
    raise_together([f"data={names} mixes text and chat messages; train on one kind"] if len(kinds) > 1 else [])
