"""The run card says what was run and what came out, and can be added to."""

import json

import pytest
import yaml

from s2ft.common.files import staged
from s2ft.finetune.card import final_mean, read_card, to_markdown, write_card
from s2ft.finetune.model_card import model_card
from s2ft.runtime.environment import environment

CARD = {
    "status": "finished",
    "options": {"model": "some/model", "ratios": {"o_proj": 0.5}, "data": ["a.json", "b|c.json"], "seed": None},
    "training": {"steps": 3, "final_loss": 1.23456789},
    "loss_curve": [(1, 3.0), (2, 2.0), (3, 1.0)],
}


@pytest.fixture(autouse=True)
def light() -> None:
    """Here pictures are drawn, unlike in tests of runs."""


def test_a_card_is_json_markdown_and_a_picture(tmp_path):
    write_card(tmp_path, CARD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "run.json", "run.md"]
    assert read_card(tmp_path) == json.loads(json.dumps(CARD))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "run.md").read_text()
    assert {"Status: finished", "![loss](loss.png)", "| ratios | o_proj=0.5 |"} <= set(text.splitlines())
    assert {r"| data | a.json, b\|c.json |", "| final_loss | 1.23457 |"} <= set(text.splitlines())


def test_a_section_can_be_added(tmp_path):
    write_card(tmp_path, CARD)
    write_card(tmp_path, {**read_card(tmp_path), "scores": {"arithmetic": 0.75}})
    assert read_card(tmp_path)["training"]["steps"] == 3
    assert "| arithmetic | 0.75 |" in (tmp_path / "run.md").read_text()


def test_scores_of_tasks_are_a_table():
    one = {"base": 0.125, "tuned": 0.5, "base_interval": [0.1, 0.15000000000000002], "questions": 8}
    lines = to_markdown(
        {"status": "finished", "scores": {"gsm8k": one, "river": {"base": 0.0, "tuned": 1.0}}}
    ).splitlines()
    start = lines.index("## Scores")
    assert lines[start + 2 : start + 6] == [
        "| | base | tuned | base interval | questions |",
        "|---|---|---|---|---|",
        "| gsm8k | 0.125 | 0.5 | 0.1, 0.15 | 8 |",
        "| river | 0 | 1 | | |",
    ]


def test_without_a_curve_there_is_no_picture(tmp_path):
    write_card(tmp_path, {"status": "interrupted"})
    assert not (tmp_path / "loss.png").exists()
    assert "loss.png" not in to_markdown({"status": "interrupted"})


def test_the_environment_names_versions_and_machine_but_no_path():
    found = environment()
    assert {"python", "torch", "transformers", "peft", "trl", "s2ft", "system", "cpu"} <= found.keys()
    assert "/" not in json.dumps(found)


def test_the_final_mean_is_the_mean_of_the_last_tenth():
    assert final_mean([(step, float(step)) for step in range(20)]) == 18.5
    assert final_mean([]) is None


def test_files_are_staged_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "folder"
    with pytest.raises(OSError, match="disk full"):
        write_half(target)
    assert not (tmp_path / "new").exists()
    for text in ("one", "two"):
        with staged(target) as aside:
            (aside / "kept").mkdir()
            (aside / "kept" / "a.txt").write_text(text)
    assert (target / "kept" / "a.txt").read_text() == "two"
    assert [path.name for path in target.iterdir()] == ["kept"]


def write_half(target):
    with staged(target) as aside:
        (aside / "half.txt").write_text("ha")
        raise OSError("disk full")


def test_the_model_card_names_a_base_on_the_hub():
    options = {"model": "org/base", "method": "s2ft", "objective": "sft", "data": ["org/set:main", "./here.json"]}
    size = {"trainable_parameters": 10, "model_parameters": 1000}
    card = {"options": options, "adapter": size, "data": {}, "training": {"final_loss": 0.5}}
    text = model_card({**card, "scores": {"boolq": {"base": 0.5, "tuned": 0.75, "questions": 8}}}, ["loss.png"])
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "org/base"
    assert head["datasets"] == ["org/set"]
    assert head["library_name"] == "peft"
    assert {"peft", "s2ft"} <= set(head["tags"])
    assert head["metrics"] == ["accuracy"]
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.75
    assert "| boolq, base → tuned | 50.0% → 75.0% of 8 questions |" in text
    assert "![Training loss](loss.png)" in text
    assert "channels.png" not in text
    assert "changes 10 of the model's 1,000 parameters (1.00%)" in text
