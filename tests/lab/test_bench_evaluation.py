"""`s2ft bench evaluation` on a few short answers: rows are whole, and differing answers are found by comparing texts."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from s2ft import S2FTError
from s2ft.cli.app import app
from s2ft.data.prompts import alpaca_prompt
from s2ft.demo import base_path
from s2ft.evaluate.questions import load_questions
from s2ft.evaluate.tasks import Decoding, missing
from s2ft.lab.bench import evaluation as bench
from s2ft.lab.bench.evaluation import (
    REFERENCE,
    TASK,
    AnswerAll,
    Texts,
    bench_evaluation,
    contestants,
    evaluation_line,
    made_prompts,
)
from s2ft.lab.bench.report import Report
from s2ft.runtime.models import load_model, load_tokenizer

BASE = str(base_path())

REAL = Path(os.environ.get("S2FT_DATA", Path(__file__).parents[3] / "shared" / "data"))
METHODS = ["s2ft eval", REFERENCE, "generate, file order"]
SHORT = Decoding(beams=2, max_new_tokens=3)
KEYS = {
    "method", "prompts", "batch_size", "beams", "max_new_tokens", "seconds", "seconds_p20", "seconds_p80", "ratio",
    "differing",
}  # fmt: skip


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions of a few characters, so that the answers take no time; of several lengths."""
    monkeypatch.setattr(bench, "made_prompts", lambda count, seed: [f"{'1' * n}2 + 3 =" for n in range(count)])


def put(folder: Path, records: object) -> str:
    path = folder / "dataset" / TASK.folder / "test.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(records))
    return str(folder)


def changed(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[AnswerAll], AnswerAll]) -> None:
    """One contestant is another one."""

    def other(*args: object) -> dict[str, AnswerAll]:
        found = contestants(*args)
        return {**found, name: change(found[name])}

    monkeypatch.setattr(bench, "contestants", other)


def differing(report: Report) -> dict[str, int]:
    return {row["method"]: row["differing"] for row in report.rows}


def test_rows_are_whole() -> None:
    heard: list[float] = []
    found = bench_evaluation(BASE, limit=3, rounds=2, decoding=SHORT, tell=heard.append).as_dict()
    assert [row["method"] for row in found["rows"]] == METHODS
    reference = found["rows"][1]
    for row in found["rows"]:
        assert set(row) == KEYS
        assert [row[name] for name in ("prompts", "batch_size", "beams", "max_new_tokens")] == [3, 8, 2, 3]
        assert 0 < row["seconds_p20"] <= row["seconds"] <= row["seconds_p80"]
        assert row["ratio"] == row["seconds"] / reference["seconds"]
        assert evaluation_line(row)["differing"] == f"{row['differing']} of 3"
    assert heard == sorted(heard)
    assert heard[-1] == 1
    assert "made from seed" in found["settings"]["questions"]
    assert {"torch", "python", "cpu"} <= set(found["environment"])
    json.dumps(found, allow_nan=False)


def test_all_answer_every_prompt_the_first_two_in_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BATCH_SIZE", 2)
    tokenizer, model = load_tokenizer(BASE), load_model(BASE, torch.float32)
    prompts = made_prompts(5, seed=3)
    turns = contestants(model, tokenizer, prompts, Decoding(4, 8))
    ours, same, in_order = ([list(batch.items()) for batch in turns[name]()] for name in METHODS)
    assert [[index for index, _ in batch] for batch in in_order] == [[0, 1], [2, 3], [4]]
    longest_first = sorted(range(5), key=lambda index: -len(prompts[index]))
    assert [index for batch in ours for index, _ in batch] == longest_first
    assert ours == same
    assert any(text for batch in ours for _, text in batch)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("name", ["s2ft eval", "generate, file order"])
def test_answers_that_differ_are_counted_by_their_texts(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    honest = differing(bench_evaluation(BASE, limit=4, rounds=1, decoding=SHORT))

    def lying(contestant: AnswerAll) -> AnswerAll:
        def answers() -> Iterator[Texts]:
            for batch in contestant():
                yield {index: f"{text}!" if index in (1, 3) else text for index, text in batch.items()}

        return answers

    changed(monkeypatch, name, lying)
    assert honest == dict.fromkeys(METHODS, 0)
    assert differing(bench_evaluation(BASE, limit=4, rounds=1, decoding=SHORT)) == {**honest, name: 2}


@pytest.mark.usefixtures("brief")
def test_a_lie_in_one_round_is_counted_and_so_is_a_reference_that_changes_its_mind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds = iter(["warm-up", "first", "second"])

    def fickle(contestant: AnswerAll) -> AnswerAll:
        def answers() -> Iterator[Texts]:
            is_last = next(rounds) == "second"
            for batch in contestant():
                yield {index: "lie" if is_last and index == 2 else text for index, text in batch.items()}

        return answers

    changed(monkeypatch, REFERENCE, fickle)
    assert differing(bench_evaluation(BASE, limit=4, rounds=2, decoding=SHORT)) == {
        **dict.fromkeys(METHODS, 0),
        REFERENCE: 1,
    }


@pytest.mark.usefixtures("brief")
def test_no_answer_and_a_missing_one_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(contestant: AnswerAll) -> AnswerAll:
        return lambda: ({index: None for index in batch if index != 0} for batch in contestant())

    changed(monkeypatch, "s2ft eval", failing)
    assert differing(bench_evaluation(BASE, limit=3, rounds=1, decoding=SHORT))["s2ft eval"] == 3


def test_questions_are_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def watched(model: object, tokenizer: object, prompts: list[str], decoding: Decoding) -> dict[str, AnswerAll]:
        asked.append(list(prompts))
        return contestants(model, tokenizer, prompts, decoding)

    monkeypatch.setattr(bench, "contestants", watched)
    data = put(tmp_path, [{"instruction": f"Add {n} and 3.", "answer": str(n + 3)} for n in range(3)])
    report = bench_evaluation(BASE, data, limit=2, rounds=1, decoding=SHORT)
    assert asked[-1] == [alpaca_prompt("Add 0 and 3."), alpaca_prompt("Add 1 and 3.")]
    assert [row["prompts"] for row in report.rows] == [2, 2, 2]
    assert report.settings["questions"] == "the first 2 of gsm8k"
    assert str(tmp_path) not in json.dumps(report.as_dict())


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        ([{"instruction": "Add.", "answer": "five"}], r"test\.json:1: answer='five' must be a number"),
        ([{"question": "Add."}], "expected an object with instruction"),
        ([], "holds an empty array"),
        (
            [{"instruction": "Add.", "answer": "5"}, {"instruction": "x" * 2000, "answer": "5"}],
            r"question 2 has 21\d\d tokens; with max_new_tokens=3 that is more than the model's 2048",
        ),
    ],
)
def test_bad_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: object, problem: str) -> None:
    monkeypatch.setattr(bench, "contestants", lambda *_: pytest.fail("something was timed"))
    with pytest.raises(S2FTError, match=problem):
        bench_evaluation(BASE, put(tmp_path, records), decoding=SHORT)


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"rounds": 0}, {"decoding": Decoding(0, 3)}])
def test_numbers_below_one_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(S2FTError, match="=0 must be 1 or more"):
        bench_evaluation(BASE, **wrong)


def test_made_questions_are_as_long_as_gsm8ks() -> None:
    around = len(alpaca_prompt(""))
    lengths = [len(prompt) - around for prompt in made_prompts(2000, seed=1)]
    # 5th, 50th and 95th percentile of the 1,319 questions of the test set, in characters
    np.testing.assert_allclose(np.percentile(lengths, [5, 50, 95]), [119, 222, 431], rtol=0.1)
    assert made_prompts(3, seed=1) != made_prompts(3, seed=2)


def test_real_questions_are_as_long_as_is_said() -> None:
    if missing([TASK], str(REAL)):
        pytest.skip("the data of gsm8k are not here")
    around = len(alpaca_prompt(""))
    lengths = [len(str(question.prompt)) - around for question in load_questions(TASK, str(REAL))]
    assert [min(lengths), np.median(lengths), max(lengths)] == [bench.SHORTEST, bench.MEDIAN, bench.LONGEST]
    assert np.std(np.log(lengths)) == pytest.approx(bench.LOG_DEVIATION, abs=0.005)


@pytest.mark.usefixtures("brief")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = bench_evaluation(BASE, limit=2, rounds=1, decoding=SHORT)
    asked: list[str | None] = []
    monkeypatch.setattr(bench, "bench_evaluation", lambda data, tell: asked.append(data) or tell(1.0) or tiny)
    rows = tmp_path / "a.json"
    result = CliRunner().invoke(app, ["bench", "evaluation", "--data", "some/folder", "--json", str(rows)])
    assert result.exit_code == 0, result.exception
    assert asked == ["some/folder"]
    assert json.loads(rows.read_text())["rows"] == tiny.rows
    assert "generate, same" in result.output


def test_the_command_refuses_data_that_are_not_there(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    result = CliRunner().invoke(app, ["bench", "evaluation", "--data", nowhere, "--json", str(tmp_path / "a.json")])
    assert result.exit_code != 0
    assert isinstance(result.exception, S2FTError)
    assert nowhere in str(result.exception)
    assert not (tmp_path / "a.json").exists()
