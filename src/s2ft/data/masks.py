"""What of an example is learned, for people to see: its text as the model reads it, with marks around what is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from s2ft.data.tokens import IGNORED

OPENED, CLOSED = "⟦", "⟧"  # around what is learned
_PART = "\ufffd"  # what some bytes of a character are decoded to
LONGEST = 1500  # characters of a text that are shown


def spans(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The text of a row in pieces, each with whether it is learned.

    Args:
        row: With `input_ids` and `labels`.
        tokenizer: What made them.
    """
    ids, pieces, start, before = row["input_ids"], [], 0, ""
    for learned, tokens in groupby(row["labels"], key=lambda label: label != IGNORED):
        start += len(list(tokens))
        text = str(tokenizer.decode(ids[:start]))  # from the beginning, or a space between pieces may be lost
        text = text if start == len(ids) else text.rstrip(_PART)  # the character goes to the piece with its last byte
        pieces.append((text[len(before) :], learned))
        before = text
    return [piece for piece in pieces if piece[0]]


def marked(pieces: Sequence[tuple[str, bool]]) -> str:
    """The text with ⟦marks⟧ around what is learned; of a long one, beginning and end.

    Example:
        >>> marked([("2+3=", False), ("5", True)])
        '2+3=⟦5⟧'
    """
    text = "".join(f"{OPENED}{piece}{CLOSED}" if learned else piece for piece, learned in pieces)
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} [...] {text[-half:]}"
