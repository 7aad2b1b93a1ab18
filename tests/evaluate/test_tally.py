"""Counts and intervals, against the equations that define them."""

import math

import pytest
import torch

from s2ft.evaluate.tally import macro, mean_interval, tally, wilson
from s2ft.evaluate.tasks import TASKS


def test_wilsons_interval_solves_its_equation() -> None:
    """The ends are the shares p0 for which |p - p0| is 1.96 standard deviations of p0."""
    count = int(torch.randint(2, 400, ()))
    right = int(torch.randint(0, count + 1, ()))
    for end in wilson(right, count):
        assert math.isclose(abs(right / count - end), 1.959964 * math.sqrt(end * (1 - end) / count), abs_tol=1e-6)
    assert wilson(0, 0) == (0, 1)


def test_errors_are_counted_beside_and_not_as_wrong() -> None:
    row = {"truncated": False, "error": None, "extracted": "1", "correct": True}
    wrong = {**row, "extracted": None, "correct": False, "truncated": True}
    found = tally(TASKS["gsm8k"], [row, row, wrong, {"error": "lost"}], asked=6)
    names = ("asked", "answered", "errors", "correct", "unread", "truncated", "accuracy")
    assert [found[0][name] for name in names] == [6, 3, 1, 2, 1, 1, 2 / 3]
    assert tally(TASKS["gsm8k"], [], asked=6)[0]["accuracy"] is None


def test_the_mean_of_a_suite_weighs_tasks_and_not_questions() -> None:
    rows = [{"model": "a", "suite": "arithmetic", "task": name, "accuracy": share}
            for name, share in (("gsm8k", 0.5), ("svamp", 1.0), ("aqua (strict)", 0.0), ("mawps", None))]  # fmt: skip
    assert macro(rows) == [{"model": "a", "suite": "arithmetic", "tasks": 2, "suite_tasks": 7, "accuracy": 0.75}]


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = torch.rand(30, dtype=torch.float64)
    mean, low, high = mean_interval(values.tolist())
    half = 1.959964 * float(values.std()) / 30**0.5
    assert (mean, low, high) == pytest.approx((float(values.mean()), mean - half, mean + half))
    assert mean_interval([1.0]) is None
