"""The quickstart: a short one in the suite, the whole of it among the slow tests."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import s2ft
from s2ft.adapters.file import read_adapter
from s2ft.cli.app import app
from s2ft.demo import quickstart as module
from s2ft.demo.quickstart import NEW_SKILL, OLD_SKILLS, fresh_folder, quickstart
from s2ft.finetune.card import read_card
from s2ft.finetune.train import TrainResult

SOURCE = Path(s2ft.__file__).parents[1]


def test_a_short_quickstart_leaves_adapter_card_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = quickstart(Path("runs", "quickstart"), train_examples=64, test_examples=8)
    assert read_adapter(result.folder).parameters == result.card["adapter"]["trainable_parameters"]
    assert read_card(result.folder)["scores"] == result.accuracies
    assert list(result.accuracies) == [NEW_SKILL, *OLD_SKILLS]
    assert result.accuracies[NEW_SKILL]["base"] == 0
    curve = result.card["loss_curve"]
    assert curve[-1][1] < curve[0][1]
    _examples_that_start_from_it_run()


def _examples_that_start_from_it_run() -> None:
    """Those in the help of `s2ft inspect`, `export` and `merge`."""
    Path("src").symlink_to(SOURCE)
    files = (file.read_text(encoding="utf-8") for file in Path("src", "s2ft", "cli").glob("*.py"))
    examples = re.findall(r"Example: s2ft (.*runs/quickstart/.*)", "".join(files))
    assert {line.split()[0] for line in examples} == {"inspect", "export", "merge"}
    for line in examples:
        result = CliRunner().invoke(app, line.split())
        assert result.exit_code == 0, f"{line}: {result.output}"


def test_an_interrupted_one_compares_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = TrainResult(tmp_path, True, {}, torch.nn.Identity(), None)
    monkeypatch.setattr(module, "train", lambda options: interrupted)
    monkeypatch.setattr(module, "_scores", lambda *_: {})
    with pytest.raises(KeyboardInterrupt):
        quickstart(tmp_path / "run", train_examples=1, test_examples=1)


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    assert fresh_folder(tmp_path) == tmp_path / "quickstart"
    (tmp_path / "quickstart").mkdir()
    assert fresh_folder(tmp_path) == tmp_path / "quickstart-2"


@pytest.mark.slow
def test_the_quickstart_teaches_the_new_skill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["quickstart", "--json", "scores.json"])
    assert result.exit_code == 0, result.output
    scores = read_card("runs/quickstart/adapter")["scores"]
    assert scores[NEW_SKILL]["base"] <= 0.05
    assert scores[NEW_SKILL]["tuned"] >= 0.9
    for text in (NEW_SKILL, " inspect runs", " train --model", "kB"):
        assert text in result.output
