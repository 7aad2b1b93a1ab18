"""Renders conversations by the model's chat template, within a time limit, and finds what the template leaves out."""

from __future__ import annotations

import ctypes
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from s2ft.common.errors import S2FTError
from s2ft.data.chat import CALLS, OPTIONS, REASONING, Message

SECONDS = 20.0  # for one conversation; milliseconds are usual
_PROBE = "how are you"
Result = TypeVar("Result")


class RefusedTemplateError(S2FTError):
    """The template refuses this conversation; it may take another."""


class EndlessTemplateError(S2FTError):
    """The template does not come to an end; no other conversation need be tried."""


class _Stop(BaseException):
    """Ends a thread that is not waited for any more."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: dict[str, Any] | None = None,
    ask: bool = False,
) -> str:
    """The conversation as the template lays it out; with `ask`, up to where the assistant's next turn begins.

    Raises:
        RefusedTemplateError: if the template refuses the conversation.
        EndlessTemplateError: if it does not come to an end.
    """

    def lay_out(told: Sequence[Message]) -> str:
        return str(
            tokenizer.apply_chat_template(list(told), tokenize=False, add_generation_prompt=ask, **(options or {}))
        )

    try:
        try:
            return _limited(lambda: lay_out(messages))
        except TypeError:  # some templates join the arguments of a call to text, so they want them as text
            return _limited(lambda: lay_out([_with_arguments_as_text(message) for message in messages]))
    except EndlessTemplateError:
        raise
    except Exception as error:  # a template is a program: it raises what it likes, such as "roles must alternate"
        reason = str(error)
    roles = ", ".join(message["role"] for message in messages)
    raise RefusedTemplateError(f"the model's chat template refuses a conversation of {roles}: {reason}")


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: dict[str, Any] | None = None,
    ask: bool = False,
) -> list[int]:
    """The token ids of what `render` gives: the template writes all special tokens itself."""
    ids: list[int] = tokenizer(render(tokenizer, messages, options, ask), add_special_tokens=False)["input_ids"]
    return ids


def left_out(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: dict[str, Any],
    learned: int,
    text: str | None = None,
) -> Iterator[str]:
    """Names what the template leaves out of the conversation: fields whose removal does not change the text.

    Args:
        learned: The index of the first message that the loss falls on. Reasoning is looked for from there on only, as
            templates leave out that of earlier turns on purpose.
        text: The conversation as `render` lays it out, where that has been done already.
    """
    whole = render(tokenizer, messages, options) if text is None else text

    def is_same(changed: Sequence[Message], options: dict[str, Any]) -> bool:
        try:
            return render(tokenizer, changed, options) == whole
        except RefusedTemplateError:
            return False

    for name in OPTIONS:
        if options.get(name) and is_same(messages, {key: item for key, item in options.items() if key != name}):
            yield name
    template = tokenizer.get_chat_template(tools=options.get("tools"))
    yield from (f"chat_template_kwargs.{name}" for name in options if name not in OPTIONS and name not in template)
    for index, message in enumerate(messages):
        for name, bare in _without_each(message, reasoning=index >= learned):
            surely = name == "content" and len(message) == 2 and message["content"].strip() in whole
            if not surely and is_same([*messages[:index], bare, *messages[index + 1 :]], options):
                yield f"{name} of message {index + 1} ({message['role']})"


def _without_each(message: Message, reasoning: bool) -> Iterator[tuple[str, Message]]:
    """The names of the fields that say something, each with the message without it."""
    if message["content"].strip():
        yield "content", {**message, "content": ""}
    if message.get(CALLS):
        yield CALLS, {key: item for key, item in message.items() if key != CALLS}
    if reasoning and any(message.get(name) for name in REASONING):
        yield "reasoning", {key: item for key, item in message.items() if key not in REASONING}


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token by which the template ends a turn of the assistant: the first added token after what was said.

    None without a template, or if it ends turns by no such token.
    """
    if not tokenizer.chat_template:
        return None
    try:
        text = render(tokenizer, [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _PROBE}])
    except RefusedTemplateError:
        return None
    _, said, rest = text.rpartition(_PROBE)
    added = tokenizer.added_tokens_decoder
    ids: list[int] = tokenizer(rest, add_special_tokens=False)["input_ids"] if said else []
    return next((token for token in ids if token in added and added[token].content.strip()), None)


def _with_arguments_as_text(message: Message) -> Message:
    if CALLS not in message:
        return message
    return {**message, CALLS: [_as_text(call) for call in message[CALLS]]}


def _as_text(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _as_text(call["function"])}
    arguments = call.get("arguments")
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)} if isinstance(arguments, dict) else call


class _Watched(threading.Thread):
    """Does a task; each text that a template renders there has a limit of its own."""

    def __init__(self, task: Callable[[], Any]) -> None:
        super().__init__(daemon=True, name="chat template")
        self.task, self.limit = task, math.inf  # until when the template may run, by `time.monotonic`
        self.found: list[Any] = []
        self.errors: list[Exception] = []

    def run(self) -> None:
        try:
            self.found.append(self.task())
        except _Stop:
            pass
        except Exception as error:  # goes to whoever asked
            self.errors.append(error)

    def limited(self, task: Callable[[], str]) -> str:
        """Runs a template, in this thread."""
        self.limit = time.monotonic() + SECONDS
        try:
            return task()
        finally:
            self.limit = math.inf

    def stop(self) -> None:
        """Ends what it does, wherever it is."""
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident or 0), ctypes.py_object(_Stop))


def watched(task: Callable[[], Result]) -> Result:
    """Does a task that renders many texts, in one thread of its own: a thread for each would take as long as the texts.

    Raises:
        EndlessTemplateError: if one text takes longer than `SECONDS`; the thread is stopped then.
        Exception: whatever the task raises.
    """
    thread = _Watched(task)
    thread.start()
    while thread.is_alive():
        thread.join(min(SECONDS, 1.0))
        if time.monotonic() > thread.limit:
            thread.stop()
            raise EndlessTemplateError(
                f"the model's chat template did not come to an end within {SECONDS:g} seconds; take a model with a sound one"
            )
    for error in thread.errors:
        raise error
    found: Result = thread.found[0]
    return found


def _limited(task: Callable[[], str]) -> str:
    """Runs a template within the limit."""
    thread = threading.current_thread()
    if isinstance(thread, _Watched):
        return thread.limited(task)
    return watched(lambda: _limited(task))
