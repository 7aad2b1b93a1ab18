"""How an answer is read out of what a model wrote: the rules of LLM-Adapters, which the S²FT paper is scored by.

    commonsense   first of the task's words, as they are spelled    "True. So the answer is false."     →  false
    arithmetic    last number, commas dropped, right within 0.001   "so 1,000 + 20 = 1,020."            →  1020.
    AQuA          first capital A to E, wherever it stands          "A pen costs 2. The answer is (C)." →  A
    AQuA, strict  the letter that is stated as the answer           "A pen costs 2. The answer is (C)." →  C

A rule reads text, it does not understand it: the first AQuA rule takes the article "A" for a choice. It is the paper's, so the
strict one stands beside it.

Source: https://github.com/AGI-Edgerunners/LLM-Adapters (what its evaluation takes from an answer), written anew.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Protocol

TOLERANCE = 0.001

_NUMBER = re.compile(r"-?\d+\.?\d*", re.ASCII)
_LETTER = re.compile(r"[A-E]")
_STATED = re.compile(r"(?i:answer\s+is:?\s*(?:option\s+|choice\s+)?)[(\[*\"']*([A-E])\b")


class Rule(Protocol):
    """Reads an answer, and compares it with the right one."""

    @property
    def wanted(self) -> str:
        """What a right answer looks like, for error messages."""

    def read(self, text: str) -> str | None:
        """The answer in `text`; None if there is none."""

    def gold(self, value: Any) -> str | None:
        """The right answer of a record; None if this rule could never read it."""

    def agree(self, answer: str, gold: str) -> bool:
        """Whether what was read is right."""


@dataclass(frozen=True)
class Words:
    """The first of a few words, spelled exactly so: "True" is not "true".

    Example:
        >>> Words("true", "false").read("True. So the answer is false, not true.")
        'false'
    """

    words: tuple[str, ...]

    def __init__(self, *words: str) -> None:
        object.__setattr__(self, "words", words)

    @property
    def wanted(self) -> str:
        """The words."""
        return f"one of {', '.join(self.words)}"

    def read(self, text: str) -> str | None:
        """The word that comes first."""
        found = re.search("|".join(map(re.escape, self.words)), text)
        return found.group() if found else None

    def gold(self, value: Any) -> str | None:
        """The value itself, in lower case."""
        word = str(value).strip().lower()
        return word if word in self.words else None

    def agree(self, answer: str, gold: str) -> bool:
        """Whether they are equal."""
        return answer == gold


def numbered(word: str, count: int) -> Words:
    """`word1` to `word{count}`.

    Example:
        >>> numbered("option", 2).words
        ('option1', 'option2')
    """
    return Words(*(f"{word}{number}" for number in range(1, count + 1)))


@dataclass(frozen=True)
class LastNumber:
    """The last number, compared within 0.001.

    Example:
        >>> rule = LastNumber()
        >>> rule.read("7 - 3 = 4 crayons, at $1,000.50 each"), rule.agree("1000.50", "1000.5004")
        ('1000.50', True)
    """

    wanted: str = "a number"

    def read(self, text: str) -> str | None:
        """The digits, sign and point of the last number, without commas."""
        found = _NUMBER.findall(text.replace(",", ""))
        return found[-1] if found else None

    def gold(self, value: Any) -> str | None:
        """The number as text; the last one if the value holds more than a number."""
        text = str(value).replace(",", "").strip()
        return text if _is_number(text) else None

    def agree(self, answer: str, gold: str) -> bool:
        """Whether they differ by 0.001 or less."""
        return abs(float(answer) - float(gold)) <= TOLERANCE


@dataclass(frozen=True)
class FirstLetter:
    """The first capital A to E anywhere.

    Example:
        >>> FirstLetter().read("the answer is (D)."), FirstLetter().read("The answer, Dear, is B")
        ('D', 'D')
    """

    wanted: str = "a letter from A to E"

    def read(self, text: str) -> str | None:
        """The letter that comes first."""
        found = _LETTER.search(text)
        return found.group() if found else None

    def gold(self, value: Any) -> str | None:
        """The letter itself."""
        letter = str(value).strip().upper()
        return letter if len(letter) == 1 and _LETTER.match(letter) else None

    def agree(self, answer: str, gold: str) -> bool:
        """Whether they are equal."""
        return answer == gold


@dataclass(frozen=True)
class StatedLetter(FirstLetter):
    """The letter after the last "answer is"; or a text that is a letter and nothing else.

    Example:
        >>> rule = StatedLetter()
        >>> rule.read("Eve pays 3. The answer is (C)."), rule.read(" (b) "), rule.read("A dozen eggs")
        ('C', 'B', None)
    """

    def read(self, text: str) -> str | None:
        """The letter that is stated last."""
        found = _STATED.findall(text)
        if found:
            return str(found[-1])
        return self.gold(text.strip().strip("().:*"))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
