"""`s2ft bench serve` without its processes: what is asked has the right answers, and what comes back is counted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from live_server import Live
from s2ft import S2FTError
from s2ft.demo import base_path
from s2ft.lab.bench import serve
from s2ft.lab.bench.clients import Question, ask_for
from s2ft.lab.bench.report import model_label
from s2ft.lab.bench.serve import bench_serve, serve_line
from s2ft.lab.bench.servers import running
from s2ft.serve.model import load_base
from s2ft.serve.options import ServeOptions
from s2ft.serve.service import Service

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, list[Question]]]:
    """A server with one adapter, and what it is asked."""
    folder, patch = tmp_path_factory.mktemp("bench"), pytest.MonkeyPatch()
    patch.setattr(serve, "TEXTS", serve.TEXTS[:2])
    patch.setattr(serve, "LENGTHS", (12, 16))
    model, tokenizer = serve._without_end(str(base_path()), folder / "base")
    names = serve._make_adapters(model, folder / "adapters", 1)
    questions = serve._questions(model, tokenizer, folder / "adapters", names)
    settings: dict[str, Any] = {"model": str(folder / "base"), "adapters": folder / "adapters", "name": "base"}
    server = Live(Service(ServeOptions.parse(settings), load_base(settings["model"], torch.float32)), [])
    yield server, questions
    server.stop()
    patch.undo()


def test_answers_are_those_of_the_server(asked: tuple[Live, list[Question]]) -> None:
    server, questions = asked
    assert {question.model for question in questions} == {"base", "adapter-0"}
    assert len({question.answer for question in questions}) == len(questions) > 2
    assert "" not in {question.answer for question in questions}
    row = ask_for(0, server.port, questions, 4).row()
    assert {key: row[key] for key in ("requests", "failed", "wrong")} == {"requests": 4, "failed": 0, "wrong": 0}
    assert 0 < row["p50_ms"] <= row["p95_ms"]
    assert row["tokens_per_s"] == pytest.approx(
        sum(question.tokens for question in (questions * 4)[:4]) / row["seconds"]
    )


def test_what_is_wrong_or_fails_is_counted(asked: tuple[Live, list[Question]]) -> None:
    server, (first, *_) = asked
    other = Question("base", first.prompt, first.tokens, "something else")
    row = ask_for(0, server.port, [first, other, Question("nobody", first.prompt, 1, "")], 3).row()
    assert {key: row[key] for key in ("requests", "failed", "wrong")} == {"requests": 3, "failed": 1, "wrong": 1}
    gone = ask_for(0, 1, [first], 1).row()
    assert (gone["failed"], gone["tokens_per_s"]) == (1, 0)


def test_a_row_of_the_table() -> None:
    row: dict[str, Any] = {"what": "load", "clients": 64, "requests": 9, "failed": 0, "wrong": 0, "tokens_per_s": 12.3}
    line = serve_line({**row, "p50_ms": 1.0, "p95_ms": 2.0, "memory": 5_000_000})
    assert line == {
        "what": "load × 64",
        "requests": "9",
        "failed": "0",
        "wrong": "0",
        "tokens/s": "12",
        "p50 ms": "1",
        "p95 ms": "2",
        "MB": "5",
    }


def test_a_report_does_not_say_where_a_model_lies(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert model_label(str(tmp_path / "mine")) == "mine"
    assert model_label("org/name") == "org/name"


@pytest.mark.parametrize("option", ["clients", "adapters", "seconds"])
def test_numbers_are_positive(option: str) -> None:
    with pytest.raises(S2FTError, match=f"{option}=0 is not more than 0"):
        bench_serve(**{option: 0})


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(S2FTError, match=r"does not start; it says:(.|\n)*nowhere"),
        running(["/nowhere"], tmp_path / "log"),
    ):
        pass


@pytest.mark.slow
def test_the_whole_of_it() -> None:
    torch.manual_seed(0)
    rows = {row["what"]: row for row in bench_serve(clients=4, adapters=2, seconds=5).rows}
    assert list(rows) == ["load", "single", "merged"]
    assert all(row["failed"] == row["wrong"] == 0 < row["tokens_per_s"] for row in rows.values())
