"""What an error lists is kept beside its text."""

import pickle

import pytest

from s2ft.common.errors import MOST_PROBLEMS, S2FTError, gathered, raise_by_place, raise_together


def test_problems_are_kept_whole_and_all_of_them() -> None:
    """Also those that a message of many leaves out, and one whose own text looks like a list."""
    problems = ["a value of\n  - several lines", *(f"problem {number}" for number in range(2 * MOST_PROBLEMS))]
    assert gathered(lambda: raise_together(problems)) == problems
    with pytest.raises(S2FTError, match=f"and {MOST_PROBLEMS + 1} more") as caught:
        raise_together(problems)
    assert pickle.loads(pickle.dumps(caught.value)).problems == problems


def test_problems_by_place_are_raised_together_with_others() -> None:
    found = gathered(lambda: raise_by_place([("a:1", "no text"), ("a:2", "no end")]), lambda: raise_together(["c"]))
    assert found == ["a:1: no text", "a:2: no end", "c"]
