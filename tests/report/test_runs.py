"""Several runs beside each other: which figure is the quality, what keeps runs from being compared, and the page."""

import copy
import json
import re
from pathlib import Path

import pytest

from s2ft import S2FTError
from s2ft.report.runs import differences, quality, read_runs, rows, runs_page


@pytest.fixture
def cards(finished) -> dict[str, dict]:
    other = copy.deepcopy(finished.card)
    other["training"] |= {"method": "lora", "best_loss": 1.25, "final_loss": 0.5, "seconds": 7.5}
    other["adapter"]["trainable_parameters"] = 123_456
    return {"a": copy.deepcopy(finished.card), "b": other}


def test_a_row_has_the_figures_of_its_card(cards) -> None:
    first, second = rows(cards)
    training = cards["a"]["training"]
    assert first["held_out_loss"] == training["best_loss"]
    assert first["memory_bytes"] == training["peak_memory_bytes"]
    assert (second["run"], second["method"], second["parameters"]) == ("b", "lora", 123_456)
    assert first.keys() == second.keys()


def test_quality_is_what_all_runs_have(cards) -> None:
    assert quality(cards).name == "held-out loss"
    assert quality(cards).values["b"] == 1.25
    ten = {"questions": 10, "errors": 0}
    cards["a"]["scores"] = {"x": {"tuned": 0.5, **ten}, "y": {"tuned": 0.75, **ten}}
    assert quality(cards).name == "held-out loss"  # b was asked nothing
    cards["b"]["scores"] = {"y": {"tuned": 0.0, **ten}, "x": {"tuned": 0.25, **ten}}
    assert quality(cards) == ("mean score", {"a": 0.625, "b": 0.125})
    assert [row["x"] for row in rows(cards)] == [0.5, 0.25]
    cards["b"]["scores"]["x"]["errors"] = 4
    assert quality(cards).name == "held-out loss"  # b answered other questions
    cards["b"]["scores"]["x"] |= {"errors": 0, "tuned": None}  # no answer
    assert quality(cards).name == "held-out loss"
    for name, perplexity in (("a", 14.7), ("b", 22.9)):
        cards[name]["scores"] = {"perplexity": {"base": 14.7, "tuned": perplexity}}
    assert quality(cards).name == "held-out loss"  # the scores of a run need be no shares of right answers
    del cards["a"]["scores"], cards["b"]["training"]["best_loss"]
    assert quality(cards) == ("training loss", {"a": cards["a"]["training"]["final_loss"], "b": 0.5})


def test_what_is_not_alike_is_named(cards) -> None:
    assert differences(cards) == []
    cards["b"]["data"]["digest"] = "0"
    cards["b"]["environment"]["cpu"] = "another"
    assert differences(cards) == ["b and a differ in their data", "b and a differ in their processor"]
    cards["a"]["scores"], cards["b"]["scores"] = ({"x": {"tuned": 0.5, "questions": count}} for count in (100, 1000))
    assert differences(cards)[-1] == "b and a differ in their questions or in how many they answered"
    assert quality(cards).name == "held-out loss"
    cards["a"].pop("scores")
    cards["b"].pop("scores")
    cards["b"]["options"]["objective"] = "dpo"
    cards["b"]["status"] = "interrupted"
    assert {"b and a differ in their objective", "b and a differ in their status"} <= {*differences(cards)}
    assert "Not alike: b and a differ in their data." in runs_page(cards)


def test_the_page_has_a_dot_for_each_run_and_fetches_nothing(cards) -> None:
    page = runs_page(cards)
    dots = [name for name in re.findall(r"<title>(\w+)</title></circle>", page) if name in ("a", "b")]
    assert page.count('r="6"') == 3 * 2  # against parameters, time and memory
    assert dots.count("a") == dots.count("b")
    assert "123,456" in page
    assert cards["a"]["command"].split()[0] in page
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", page) == []


def test_folders_without_a_run_are_named(finished, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(S2FTError, match=r"holds no run\.json, so it is no run of s2ft train"):
        read_runs([finished.output, tmp_path / "out"])
    (tmp_path / "out" / "run.json").write_text(json.dumps({"options": {}}))
    with pytest.raises(S2FTError, match="is no run card"):
        read_runs([finished.output, tmp_path / "out"])
    with pytest.raises(S2FTError, match="is named twice"):
        read_runs([finished.output, finished.output])
    (tmp_path / "out" / "run.json").write_text(json.dumps(finished.card))
    assert list(read_runs([finished.output, tmp_path / "out"])) == [str(finished.output), str(tmp_path / "out")]
