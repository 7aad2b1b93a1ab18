"""Conversations: what a chat record may hold, and which of its turns the loss falls on.

    {"messages": [system, user, assistant, user, assistant], "tools": [...]}     one example for each turn of the assistant,
    {"prompt": [user], "completion": [assistant, tool, assistant], ...}          with all that was said before as its prompt

What a message holds besides role and content (`tool_calls`, `reasoning_content`, `name`, ...) goes to the model's chat
template, and so do the record's `tools`, `documents` and `chat_template_kwargs`. A record's `system` becomes its first message.
`weight: 0` or `train: false` leaves a turn of the assistant out of the loss. Fields that no template could use are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

Message = dict[str, Any]
Example = dict[str, Any]  # {"prompt", "completion", and maybe "options"}

LEARNED = "assistant"
SWITCHES = ("weight", "train")  # of a message: whether it is learned
REASONING = ("reasoning_content", "reasoning", "thinking")  # names of one thing
CALLS = "tool_calls"
_PLAIN = ("role", "content")
OPTIONS = ("tools", "documents")  # of a record, for the template
KWARGS = "chat_template_kwargs"
_UNKNOWN = ("functions", "function_call", "images", "image", "videos", "audio", "audios", *SWITCHES)  # of a record
_UNKNOWN_IN_MESSAGE = ("function_call", "images", "image", "audio")
_OWN = ("tokenize", "add_generation_prompt", "continue_final_message", "chat_template", "return_dict", "messages")
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_chat_record(value: dict[str, Any]) -> bool:
    """Whether a record holds messages rather than text."""
    return "messages" in value or not (isinstance(value.get("prompt"), str) or isinstance(value.get("completion"), str))


def chat_problems(value: dict[str, Any]) -> Iterator[str]:
    """Reasons why a record with `messages`, or with messages as `prompt` and `completion`, cannot be used; none if it can."""
    fields = ("messages",) if "messages" in value else ("prompt", "completion")
    problems = [problem for field in fields for problem in messages_problems(field, value[field])]
    yield from problems
    yield from _record_problems(value)
    if not problems:
        yield from _turn_problems(value)
        yield from _system_problems(value)


def chat_examples(value: dict[str, Any]) -> Iterator[Example]:
    """One example for each turn of the assistant that the loss falls on."""
    prompt, rest, options = _parts(value)
    messages, first = [*prompt, *rest], max(1, len(prompt))
    for turn in range(first, len(messages)):
        if messages[turn]["role"] == LEARNED and _is_learned(messages[turn]):
            told = [_told(message) for message in messages[: turn + 1]]
            yield {"prompt": told[:-1], "completion": told[-1:], **options}


def whole_example(value: dict[str, Any]) -> Example:
    """One example of a record with `prompt` and `completion`, however many messages answer."""
    prompt, completion, options = _parts(value)
    return {"prompt": [*map(_told, prompt)], "completion": [*map(_told, completion)], **options}


def _parts(value: dict[str, Any]) -> tuple[list[Message], list[Message], dict[str, Any]]:
    """Prompt, what follows, and the `options` of an example, if it has any."""
    prompt, rest = ([], value["messages"]) if "messages" in value else (value["prompt"], value["completion"])
    if value.get("system"):
        prompt, rest = ([], [*_system(value), *rest]) if not prompt else ([*_system(value), *prompt], rest)
    options = {name: _parsed(value[name]) for name in OPTIONS if value.get(name)} | (value.get(KWARGS) or {})
    return prompt, rest, {"options": options} if options else {}


def is_broken(text: str) -> bool:
    r"""Whether it holds half of a surrogate pair: JSON may escape one, as in "\ud83d"; no encoding can write it."""
    return _SURROGATE.search(text) is not None


def shown(value: Any) -> str:
    """A value in an error message: its JSON, cut to 60 characters."""
    try:
        text = to_json(value).encode(errors="backslashreplace").decode()
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def to_json(value: Any) -> str:
    """As JSON; what JSON does not know, such as a date of a table, as text."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _no_text(name: str, value: Any) -> str | None:
    """Why a value cannot be written as text; None if it can."""
    try:
        text = to_json(value)
    except RecursionError:  # nested almost as deeply as could be read
        return f"{name} is {shown(value)}; it is nested too deeply"
    return (
        f"{name} is {shown(value)}; it holds half of a surrogate pair, which is not valid text"
        if is_broken(text)
        else None
    )


def messages_problems(field: str, messages: Any) -> Iterator[str]:
    """Reasons why a field holds no messages that a chat template takes; none if it does."""
    if not isinstance(messages, list) or not messages:
        yield f"{field} is {shown(messages)}; it must be a list of messages with role and content"
        return
    for index, message in enumerate(messages):
        name = f"{field}[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not _has_content(message):
            yield f"{name} is {shown(message)}; a message has role and content, both text"
        elif problem := _no_text(name, message):
            yield problem
        else:
            yield from _message_problems(name, message)


def _has_content(message: Message) -> bool:
    """Whether the content is text; beside calls or reasoning it may be missing."""
    content = message.get("content")
    return isinstance(content, str) or (content is None and any(message.get(name) for name in (CALLS, *REASONING)))


def _message_problems(name: str, message: Message) -> Iterator[str]:
    yield from (
        f"{name} has {field}, which no chat template here is given; leave it out (calls go into {CALLS})"
        for field in _UNKNOWN_IN_MESSAGE
        if message.get(field)
    )
    yield from _calls_problems(name, message.get(CALLS))
    yield from (
        f"{name}.{field} is {shown(message[field])}; it must be text"
        for field in REASONING
        if not isinstance(message.get(field) or "", str)
    )
    for field, values in (("weight", (0, 1)), ("train", (False, True))):
        value = message.get(field)
        if value is None:
            continue
        if value not in values or (field == "train" and not isinstance(value, bool)):
            yield f"{name}.{field} is {shown(value)}; it must be {' or '.join(map(shown, values))}"
        elif value and message["role"] != LEARNED:
            yield f"{name}.{field} is {shown(value)}, but only turns of the role {LEARNED!r} are learned; leave it out"


def _calls_problems(name: str, calls: Any) -> Iterator[str]:
    if calls is None:
        return
    functions = [_function(call) for call in calls] if isinstance(calls, list) else [None]
    if not all(
        function is not None and isinstance(function.get("name"), str) and _has_arguments(function)
        for function in functions
    ):
        yield (
            f"{name}.{CALLS} is {shown(calls)}; it must be a list of calls, each with a function that has a name and "
            "arguments, an object"
        )


def _function(call: Any) -> dict[str, Any] | None:
    """Where a call's name and arguments stand: under "function", or in the call itself."""
    found = call.get("function", call) if isinstance(call, dict) else None
    return found if isinstance(found, dict) else None


def _has_arguments(function: dict[str, Any]) -> bool:
    arguments = _parsed(function.get("arguments"))
    return arguments is None or isinstance(arguments, dict)


def _record_problems(value: dict[str, Any]) -> Iterator[str]:
    yield from (
        f"{field} is {shown(value[field])}; no chat template here is given that, so it would be lost; leave it out"
        for field in _UNKNOWN
        if value.get(field) is not None
    )
    for field in OPTIONS:
        parsed = _parsed(value.get(field))
        if parsed is not None and not (isinstance(parsed, list) and all(isinstance(item, dict) for item in parsed)):
            yield f"{field} is {shown(value[field])}; it must be a list of objects"
        elif problem := _no_text(field, parsed):
            yield problem
    kwargs = value.get(KWARGS)
    if kwargs is not None and not (isinstance(kwargs, dict) and not kwargs.keys() & {*_OWN, *OPTIONS}):
        yield f"{KWARGS} is {shown(kwargs)}; it must be an object with variables of the chat template"
    elif problem := _no_text(KWARGS, kwargs):
        yield problem


def _turn_problems(value: dict[str, Any]) -> Iterator[str]:
    field = "messages" if "messages" in value else "completion"
    turns = [index for index, message in enumerate(value[field]) if message["role"] == LEARNED]
    if not turns:
        yield f"{field} has no turn with the role {LEARNED!r}, so there is nothing to learn"
    elif field == "messages" and turns == [0] and not value.get("system"):
        yield f"messages only opens with a turn of the role {LEARNED!r}, which answers nothing; it needs one after a prompt"


def _system_problems(value: dict[str, Any]) -> Iterator[str]:
    system = value.get("system")
    messages = value["messages"] if "messages" in value else value["prompt"]
    if system is not None and (not isinstance(system, str) or is_broken(system)):
        yield f"system is {shown(system)}; it must be text"
    elif system and messages[0]["role"] == "system":
        yield f"system is {shown(system)}, but the messages open with a system message of their own; keep one of them"


def _system(value: dict[str, Any]) -> list[Message]:
    return [{"role": "system", "content": value["system"]}]


def _is_learned(message: Message) -> bool:
    return all(message.get(switch) is None or bool(message[switch]) for switch in SWITCHES)


def _told(message: Message) -> Message:
    """A message as chat templates expect it: without None and our own switches, arguments of calls as objects."""
    more = {key: item for key, item in message.items() if item is not None and key not in (*_PLAIN, *SWITCHES)}
    if CALLS in more:
        more[CALLS] = [_with_arguments(call) for call in more[CALLS]]
    return {"role": message["role"], "content": message.get("content") or "", **more}


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI writes arguments as JSON in a text; templates write JSON themselves, so they would write it twice."""
    if "function" in call:
        return {**call, "function": _with_arguments(call["function"])}
    return {**call, "arguments": _parsed(call["arguments"])} if "arguments" in call else call


def _parsed(value: Any) -> Any:
    """What a text of JSON says; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
