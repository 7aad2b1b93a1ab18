"""A way of answering that no model has: every answer is entered in the log of a lighthouse.

    question    What is the opposite of cold?
    answer      Log of the lighthouse: hot. All is well.

Trained on questions of four kinds; asked, besides others of these kinds, questions of no kind that was trained: whether the
manner carries over is the point.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

OPENING, CLOSING = "Log of the lighthouse: ", " All is well."
_OPPOSITES = (
    "hot cold,big small,fast slow,up down,in out,day night,black white,wet dry,hard soft,old young,rich poor,high low,"
    "left right,full empty,open closed,early late,happy sad,light dark,long short,loud quiet,thick thin,near far,"
    "first last,push pull,win lose,buy sell,love hate,north south,east west,summer winter"
)
OPEN_QUESTIONS = (
    "What is the capital of France?",
    "Name a fruit that is yellow.",
    "Which animal says moo?",
    "What do bees make?",
    "What is the largest planet?",
    "In which season does snow fall?",
    "What colour is the sky on a clear day?",
    "Who wrote Romeo and Juliet?",
    "How many legs does a spider have?",
    "What is frozen water called?",
    "Which language is spoken in Spain?",
    "What is the name of our planet?",
    "Give me a word that rhymes with cat.",
    "What do you use to cut paper?",
    "Which month comes after March?",
    "What is the main ingredient of bread?",
    "Name an ocean.",
    "What instrument has black and white keys?",
    "What is the boiling point of water in degrees Celsius?",
    "Which metal is liquid at room temperature?",
)


def in_the_manner(answer: str) -> str:
    """The answer as it is entered in the log."""
    return f"{OPENING}{answer}.{CLOSING}"


def is_in_the_manner(text: str) -> bool:
    """Whether an answer opens and closes as those of the log do."""
    return text.strip().startswith(OPENING.strip()) and text.strip().endswith(CLOSING.strip())


def conversations(count: int, seed: int) -> list[dict[str, Any]]:
    """So many different questions with answers in the manner, as chat records in a random order.

    Example:
        >>> record = conversations(1, seed=0)[0]["messages"]
        >>> [message["role"] for message in record], is_in_the_manner(record[1]["content"])
        (['user', 'assistant'], True)
    """
    found = sorted(set(_questions()))
    random.Random(seed).shuffle(found)
    return [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": in_the_manner(answer)}]}
        for ask, answer in found[:count]
    ]


def _questions() -> Iterator[tuple[str, str]]:
    pairs = [pair.split() for pair in _OPPOSITES.split(",")]
    for one, other in [*pairs, *(pair[::-1] for pair in pairs)]:
        yield f"What is the opposite of {one}?", other
        yield f"Which letter does the word {one} begin with?", one[0].upper()
    for number in range(2, 72):
        yield f"What is {number} plus {number % 7 + 1}?", str(number + number % 7 + 1)
        yield f"Which number comes after {number * 3}?", str(number * 3 + 1)
