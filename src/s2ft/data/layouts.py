"""What a record is, by its fields, and how it comes to be one of the layouts that `examples.py` and `preferences.py` read.

    chat                   messages                                       as it is
    ShareGPT               conversations: [{"from", "value"}, ...]        → messages
    prompt and completion  prompt, completion                             as it is
    Alpaca                 instruction, output (and input)                as it is
    question and answer    question, answer                               → instruction, output
    text                   text (and no prompt)                           → an empty prompt, and all of it to be learned
    preferences            chosen, rejected (and prompt or conversations) → prompt, chosen, rejected
    judged answers         prompt, completion, label                      as it is

The first whose fields a record has all of is taken. `--map` gives columns the names that these layouts know.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trl.data_utils import is_conversational_from_value, maybe_convert_to_chatml

from s2ft.common.errors import S2FTError
from s2ft.data.chat import CALLS
from s2ft.data.files import Record

Value = dict[str, Any]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's names of those who speak → the chat template's; others stay as they are."""

_CALL = "function_call"  # ShareGPT's name of a turn that calls a tool
_OF_MESSAGES = ("messages", "prompt", "completion", "chosen", "rejected")


@dataclass(frozen=True)
class Layout:
    """A form that records come in."""

    name: str
    fields: tuple[str, ...]  # that decide; others may stand beside them
    becomes: str  # for people
    adapt: Callable[[Value], Value] = lambda value: value
    without: tuple[str, ...] = ()  # fields that may not stand beside them


@dataclass
class Reading:
    """What was taken for what, of one source: filled in while its records are read."""

    source: str
    columns: Mapping[str, str]  # from `--map`: name → the column that it is taken from
    taken: Counter[str] = field(default_factory=Counter)  # name of a layout → records
    found: set[str] = field(default_factory=set)  # columns of the map that some record has

    def adapted(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records in one of the layouts of `examples.py`; what is none of them stays as it is, and is refused there."""
        for record in records:
            if not isinstance(record.value, dict):
                yield record
                continue
            self.found.update(column for column in self.columns.values() if column in record.value)
            value = renamed(record.value, self.columns)
            layout = layout_of(value)
            self.taken[layout.name if layout else "unknown"] += 1
            yield Record(record.place, _in_chatml(layout.adapt(_unpacked(value)) if layout else value))

    def lines(self) -> Iterator[str]:
        """What was taken, for people: one line for each layout.

        Example:
            >>> list(Reading("a.json", {}, Counter({"text": 3})).lines())
            ['a.json: 3 records with text, taken as text: all of it is learned']
        """
        for layout in LAYOUTS:
            if count := self.taken[layout.name]:
                fields = ", ".join(layout.fields)
                yield f"{self.source}: {count:,} records with {fields}, taken as {layout.name}: {layout.becomes}"


def renamed(value: Value, columns: Mapping[str, str]) -> Value:
    """A record with its columns under the names that `--map` gives them.

    Example:
        >>> renamed({"q": "2+3?", "a": "5", "id": 7}, {"instruction": "q", "output": "a"})
        {'id': 7, 'instruction': '2+3?', 'output': '5'}
    """
    there = {name: column for name, column in columns.items() if column in value}
    left = {name: item for name, item in value.items() if name not in there.values()}
    return {**left, **{name: value[column] for name, column in there.items()}}


def layout_of(value: Value) -> Layout | None:
    """The first layout whose fields a record has all of."""
    fits = (one for one in LAYOUTS if value.keys() >= set(one.fields) and value.keys().isdisjoint(one.without))
    return next(fits, None)


def check_columns(readings: Iterable[Reading]) -> None:
    """Raises `S2FTError` for a column of `--map` that no record of any source has."""
    readings = list(readings)
    found = {column for reading in readings for column in reading.found}
    missing = {column: name for reading in readings for name, column in reading.columns.items() if column not in found}
    if missing:
        given = ", ".join(f"{name}={column}" for column, name in missing.items())
        raise S2FTError(f"map: {given} names {'a column' if len(missing) == 1 else 'columns'} that no record has")


def _unpacked(value: Value) -> Value:
    """A record whose messages stand in a text, as in a table's cell, with the list that the text says."""
    texts = {name: value[name] for name in ("messages", "conversations") if isinstance(value.get(name), str)}
    return {**value, **{name: _parsed(text) for name, text in texts.items()}}


def _parsed(text: str) -> Any:
    """What a text of JSON says; any other text as it is, which is refused where it is read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _in_chatml(value: Value) -> Value:
    """A record whose messages have from and value, with role and content, by TRL's converter."""
    lists = {name: [item] if isinstance(item := value.get(name), dict) else item for name in _OF_MESSAGES}
    named = {name: copy.deepcopy(messages) for name, messages in lists.items() if _is_from_value(messages)}
    if not named:
        return value
    return {**value, **{name: [*map(_spoken, messages)] for name, messages in maybe_convert_to_chatml(named).items()}}


def _is_from_value(messages: Any) -> bool:
    return isinstance(messages, list) and bool(messages) and is_conversational_from_value({"conversations": messages})


def _spoken(message: Any) -> Any:
    """A message with the role of chat templates; what calls a tool becomes a turn of the assistant with the call."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return message
    if message["role"] != _CALL:
        return {**message, "role": ROLES.get(message["role"], message["role"])}
    calls = _parsed(str(message.get("content")))
    return {**message, "role": "assistant", "content": "", CALLS: [calls] if isinstance(calls, dict) else calls}


def _conversations(value: Value) -> Value:
    """ShareGPT's records: `conversations` are the messages."""
    return {
        **{name: item for name, item in value.items() if name != "conversations"},
        "messages": value["conversations"],
    }


def _compared(value: Value) -> Value:
    """ShareGPT's preferences, where `conversations` are what both answers answer."""
    return {**{name: item for name, item in value.items() if name != "conversations"}, "prompt": value["conversations"]}


def _question(value: Value) -> Value:
    return {**value, "instruction": value["question"], "output": value["answer"]}


def _text(value: Value) -> Value:
    return {**value, "prompt": "", "completion": value["text"]}


_BY_TURN = "an example for each turn of the assistant, by the model's chat template"
LAYOUTS = (
    Layout("ShareGPT preferences", ("conversations", "chosen", "rejected"), "a better and a worse answer", _compared),
    Layout("preferences", ("chosen", "rejected"), "a better and a worse answer"),
    Layout("judged answers", ("prompt", "completion", "label"), "an answer and its judgement; by sft it is learned"),
    Layout("chat", ("messages",), _BY_TURN),
    Layout("ShareGPT", ("conversations",), _BY_TURN, _conversations),
    Layout("prompt and completion", ("prompt", "completion"), "the completion is learned"),
    Layout("Alpaca", ("instruction", "output"), "Alpaca's prompt, and the output is learned"),
    Layout("question and answer", ("question", "answer"), "Alpaca's prompt, and the answer is learned", _question),
    Layout("text", ("text",), "all of it is learned", _text, without=("prompt",)),
)
