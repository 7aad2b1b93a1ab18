"""What is read out of an answer: each rule on its own, then on every stored answer of the real data."""

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from s2ft.evaluate.answers import score_row
from s2ft.evaluate.extraction import FirstLetter, LastNumber, StatedLetter, Words, numbered
from s2ft.evaluate.tasks import TASKS

REAL = Path(os.environ.get("S2FT_DATA", Path(__file__).parents[3] / "shared" / "data")) / "llm-adapters" / "dataset"
SCORED = [name for name, task in TASKS.items() if task.rule is not None]


@pytest.mark.parametrize(
    ("rule", "text", "found"),
    [
        (Words("true", "false"), "The correct answer is TRUE, not false", "false"),
        (Words("true", "false"), "True. So the answer is false", "false"),
        (Words("true", "false"), "False", None),
        (Words("true", "false"), "falsetrue", "false"),
        (Words("true", "false"), "yes", None),
        (numbered("answer", 5), "Answer3? The correct answer is answer5.", "answer5"),
        (numbered("answer", 5), "the answer6 or the answer 2", None),
        (numbered("option", 2), "option3, then option2 and option1", "option2"),
        (LastNumber(), "7 - 3 = 4 crayons. The answer is 1,234.50.", "1234.50"),
        (LastNumber(), "It is -3", "-3"),
        (LastNumber(), "10-4", "-4"),  # the paper's rule takes the minus for a sign
        (LastNumber(), "The answer is 4.", "4."),
        (LastNumber(), "seven ٣", None),  # digits are those of ASCII
        (FirstLetter(), "Rationale: A pen costs 2. The answer is (C).", "A"),
        (FirstLetter(), "the answer is b", None),
        (StatedLetter(), "Rationale: A pen costs 2. The answer is (C).", "C"),
        (StatedLetter(), "the answer is A. Wait, the Answer is: option D", "D"),
        (StatedLetter(), "the answer is **B**", "B"),
        (StatedLetter(), "the answer is a dozen, or Bob", None),
        (StatedLetter(), "(E).", "E"),
        (StatedLetter(), "the answer is Both", None),
        (StatedLetter(), "", None),
    ],
)
def test_an_answer_is_read_by_its_rule(rule, text, found) -> None:
    assert rule.read(text) == found


def test_numbers_agree_within_a_thousandth() -> None:
    rule = LastNumber()
    gold = float(torch.randn(()) * 100)
    assert rule.agree(repr(gold + 0.0009), repr(gold))
    assert not rule.agree(repr(gold + 0.0011), repr(gold))
    assert not rule.agree("9" * 400, "1.0")  # larger than any float
    assert rule.agree("4.", "4.0")


@pytest.mark.parametrize(
    ("value", "gold"), [("1,234", "1234"), (7, "7"), ("-15.0", "-15.0"), ("six", None), ("nan", None)]
)
def test_a_right_answer_that_is_no_number_is_refused(value, gold) -> None:
    assert LastNumber().gold(value) == gold


def test_an_answer_that_cannot_be_read_is_wrong_and_says_so() -> None:
    assert score_row(TASKS["gsm8k"], "no idea", "4") == {"extracted": None, "correct": False}


def stored(name: str) -> list[dict[str, str]]:
    path = REAL / TASKS[name].folder / "test.json"
    if not path.is_file():
        pytest.skip(f"the data of {name} is not here")
    return json.loads(path.read_text(encoding="utf-8"))


def share(name: str, outputs: list[str], golds: list[str]) -> float:
    task = TASKS[name]
    rows = [score_row(task, output, task.rule.gold(gold)) for output, gold in zip(outputs, golds, strict=True)]
    return sum(row["correct"] for row in rows) / len(rows)


@pytest.mark.parametrize("name", SCORED)
def test_gold_answers_score_100_percent(name) -> None:
    records = stored(name)
    golds = [record["answer"] for record in records]
    stated = "The answer is " if name == "aqua" else "the correct answer is "
    assert share(name, [f"{stated.lower()}{gold}" for gold in golds], golds) == 1
    if (
        TASKS[name].suite == "commonsense"
    ):  # their `output` states the right answer; that of arithmetic is a model's attempt
        assert share(name, [record["output"] for record in records], golds) == 1


@pytest.mark.parametrize("name", SCORED)
def test_shuffled_answers_score_at_chance(name) -> None:
    golds = [record["answer"] for record in stored(name)]
    other = golds[:]
    random.Random(int(torch.randint(2**31, ()))).shuffle(other)
    count, read = len(golds), TASKS[name].rule.gold
    chance = sum((times / count) ** 2 for times in Counter(map(read, golds)).values())
    found = share(name, [f"the answer is {gold}" for gold in other], golds)
    assert abs(found - chance) < 6 * (max(chance, 1 / count) / count) ** 0.5


@pytest.mark.parametrize(("name", "right"), [("addsub", 370), ("multiarith", 560), ("svamp", 803), ("gsm8k", 771)])
def test_stored_attempts_at_arithmetic_score_what_a_plain_reading_gives(name, right) -> None:
    records = stored(name)
    assert round(share(name, [r["output"] for r in records], [r["answer"] for r in records]) * len(records)) == right


def test_the_first_capital_of_aqua_is_not_the_stated_letter_on_48_of_252() -> None:
    task = TASKS["aqua"]
    pairs = [(task.rule.read(text), task.strict.read(text)) for text in (record["output"] for record in stored("aqua"))]
    stated = [(first, strict) for first, strict in pairs if strict is not None]
    assert len(stated) == 252
    assert sum(first != strict for first, strict in stated) == 48
