r"""How a token is spelt: the text, and the very bytes, that it adds to a text.

    "▁Paris"    " Paris"    by itself it decodes to "Paris": decoders drop the space at the beginning of a text
    "ĠcafÃ©"    " café"     byte-level names have a letter for each byte
    "<0xC3>"    b"\xc3"    a byte of a character that has no token; such a token, by itself, is half a character

So a token is decoded after itself, and bytes are read off its name where it is no whole character.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Sequence
from functools import cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

HALF = "\ufffd"  # what half a character decodes to
LONGEST = 4  # bytes of a character in UTF-8
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def _bytes() -> dict[str, int]:
    """The letter that byte-level names have for each byte → the byte."""
    return {letter: byte for byte, letter in bytes_to_unicode().items()}


class Spelling:
    """How the tokens of a tokenizer are spelt.

    Args:
        tokenizer: Whose tokens they are.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def name(self, token: int, is_first: bool = False) -> str:
        """A token as text within a text, or at its beginning; half a character by the name that the tokenizer has for it."""
        alone = self._decode(token)
        if HALF in alone:
            return self._own_name(token)
        return alone if is_first else self._decode(token, token)[len(alone) :]

    def data(self, token: int, is_first: bool = False) -> bytes:
        """The bytes of a token within a text, or at its beginning."""
        alone = self._decode(token)
        if HALF not in alone:
            return self.name(token, is_first).encode()
        name = self._own_name(token)
        if found := _BYTE.fullmatch(name):
            return bytes([int(found[1], 16)])
        return bytes(_bytes()[letter] for letter in name) if set(name) <= _bytes().keys() else alone.encode()

    def is_silent(self, token: int) -> bool:
        """Whether it has no part in an answer's text: a special token."""
        skipped = self._tokenizer.decode([token], skip_special_tokens=True)
        return not skipped and bool(self._decode(token))

    def begun(self, tokens: Sequence[int]) -> int:
        """How many tokens at the end belong to a character that is not complete."""
        decoder, count = getincrementaldecoder("utf-8")("replace"), 0
        decoder.decode(b"".join(map(self.data, tokens[-LONGEST:])))
        left = len(decoder.getstate()[0])
        while left > 0:
            count += 1
            left -= len(self.data(tokens[-count]))
        return count

    def _decode(self, *tokens: int) -> str:
        return str(self._tokenizer.decode(list(tokens)))

    def _own_name(self, token: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token))


class Offsets:
    """Where the tokens of an answer begin in its text, in characters; half a character begins where the whole one does.

    Args:
        spelling: Of the tokens.
        prompt: Tokens that come first, where the prompt is told.
        text: What is told of them. They end with it: tokens that the client did not send, as for the beginning of a text, lie
            before it, at 0.
    """

    def __init__(self, spelling: Spelling, prompt: Sequence[int] = (), text: str = "") -> None:
        self._spelling, self._decoder = spelling, getincrementaldecoder("utf-8")("replace")
        self._prompt_left = len(prompt)
        self._place = len(text) - len(b"".join(map(spelling.data, prompt)).decode(errors="replace"))

    def add(self, token: int) -> int:
        """Where the next token begins."""
        place, self._prompt_left = max(0, self._place), self._prompt_left - 1
        if self._prompt_left >= 0 or not self._spelling.is_silent(token):
            self._place += len(self._decoder.decode(self._spelling.data(token)))
        return place
