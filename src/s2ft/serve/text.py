r"""Tokens → text, as they come: no half characters, and nothing that may turn out to be part of a stop string.

A character may take several tokens, and what a token says may depend on the one before (a space, at the beginning of a
text). So a few tokens before the new ones are decoded with them:

    told before            new
    ... │ prefix tokens │ tokens ...      text(prefix + new) - text(prefix); kept back while it ends in "\ufffd"

A text that goes on from a prompt has the prompt's last tokens before its first ones; else it begins a text of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from s2ft.serve.spelling import HALF, Spelling

FEW = 8  # tokens of a prompt that are looked at first


class Text:
    """The text of one answer.

    Args:
        tokenizer: Whose tokens they are; special tokens have no text.
        stop: Strings that end the answer, and are not part of it.
        prompt: What its text goes on from; a character that the prompt only begins is told whole.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        begun = Spelling(tokenizer).begun(prompt) if prompt else 0
        before = self._last(prompt[: len(prompt) - begun])
        self._recent = [*before, *prompt[len(prompt) - begun :]]  # the prefix, and what is not told yet
        self._prefix = len(before)  # how many of them are the prefix
        self._is_empty = True
        self._held = ""  # the text that may begin a stop string
        self.is_stopped = False

    def add(self, token: int) -> str:
        """What can be told after this token."""
        self._recent.append(token)
        self._is_empty = False
        new = self._new()
        if not new or new.endswith(HALF):
            return ""
        self._recent, self._prefix = self._recent[self._prefix :], len(self._recent) - self._prefix
        return self._until_stop(new)

    def end(self) -> str:
        """What was kept back; the answer is complete."""
        rest = "" if self._is_empty else self._until_stop(self._new())
        rest, self._held = rest + self._held, ""
        return rest

    def _last(self, tokens: Sequence[int]) -> Sequence[int]:
        """As many of the last tokens as it takes to have some text that does not begin within a character."""
        count = FEW
        while count < len(tokens) and (HALF in (text := self._decode(tokens[-count:])) or not text):
            count *= 2
        return tokens[-count:]

    def _new(self) -> str:
        before = self._decode(self._recent[: self._prefix])
        return self._decode(self._recent)[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True)) if tokens else ""

    def _until_stop(self, new: str) -> str:
        text, self._held = self._held + new, ""
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with.

    Example:
        >>> _overlap("one two E", "END"), _overlap("one", "END")
        (1, 0)
    """
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
