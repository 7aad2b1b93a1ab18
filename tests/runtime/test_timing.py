"""Times are whole and in milliseconds; percentiles are those of a case done by hand."""

import time

import psutil
import pytest

from s2ft.runtime.timing import bytes_per_ms, free_bytes, milliseconds, no_spread, spread


def test_percentiles_against_a_case_done_by_hand() -> None:
    found = spread([50.0, 10.0, 40.0, 20.0, 30.0, 60.0], "step_ms")
    # Of six sorted times, p stands at place 5 p between the first (0) and the last (5): 2.5, 1.0, 4.0
    assert found == {"step_ms": 35.0, "step_ms_p20": 20.0, "step_ms_p80": 50.0}


def test_one_time_is_its_own_spread() -> None:
    assert spread([7.5], "ms") == {"ms": 7.5, "ms_p20": 7.5, "ms_p80": 7.5}


def test_what_was_not_timed_has_the_same_keys() -> None:
    assert list(no_spread("a_ms")) == list(spread([1.0], "a_ms"))
    assert set(no_spread("a_ms").values()) == {None}


def test_a_sleep_takes_at_least_its_time() -> None:
    assert 20 <= milliseconds(lambda: time.sleep(0.02)) < 20_000


def test_what_fails_is_not_timed() -> None:
    with pytest.raises(ZeroDivisionError):
        milliseconds(lambda: 1 / 0)


def test_bandwidth_is_the_copys_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([9.0, 4.0, 2.0, 3.0, 8.0, 5.0])
    monkeypatch.setattr("s2ft.runtime.timing.milliseconds", lambda run, device: run() is None or next(taken))
    assert bytes_per_ms("cpu", 1000) == 2 * 1000 / 2.0


def test_free_memory_is_some_of_the_machines() -> None:
    assert 0 < free_bytes("cpu") <= psutil.virtual_memory().total
