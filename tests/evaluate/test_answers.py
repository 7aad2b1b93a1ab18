"""The file of answers: whole lines, one run, errors asked again."""

import pytest

from s2ft import S2FTError
from s2ft.evaluate.answers import Answers

RUN = {"model": "m"}


def test_a_torn_line_is_cut_off_and_the_rest_goes_on(tmp_path) -> None:
    path = tmp_path / "a" / "x.jsonl"
    rows = [{"id": str(n), "output": "ü\u2028\n", "error": None} for n in range(4)]
    Answers(path, RUN).add(rows)
    whole = path.read_bytes()
    for cut in range(len(whole) - 1):  # wherever the crash came
        path.write_bytes(whole[:cut])
        answers = Answers(path, RUN)
        assert path.read_bytes() == whole[:cut]  # reading changes nothing
        answers.add(row for row in rows if row["id"] not in answers.done)
        assert path.read_bytes() == whole


def test_an_error_is_not_done_and_a_later_line_counts(tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    Answers(path, RUN).add([{"id": "0", "error": "lost"}, {"id": "1", "error": None}])
    assert Answers(path, RUN).done == {"1"}
    Answers(path, RUN).add([{"id": "0", "error": None, "output": "now"}])
    assert Answers(path, RUN).done == {"0", "1"}
    assert Answers(path, RUN).rows["0"]["output"] == "now"


def test_a_file_of_another_run_is_refused(tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    Answers(path, {"model": "a", "beams": 4}).add([])
    with pytest.raises(S2FTError, match="2 problems") as caught:
        Answers(path, {"model": "b", "beams": 1})
    assert f"model='b', but {path} holds answers with model='a'" in str(caught.value)


@pytest.mark.parametrize("middle", ["{", "[1]", '{"id": "1"}'])
def test_a_spoiled_line_in_the_middle_is_said_with_its_number(tmp_path, middle) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"run": {"model": "m"}}\n' + middle + '\n{"id": "2", "error": null}\n')
    with pytest.raises(S2FTError, match=r"x\.jsonl:2: not a line"):
        Answers(path, RUN)
