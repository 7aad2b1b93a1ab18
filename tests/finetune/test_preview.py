"""What is shown of data before it is trained on is what a run reads."""

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from s2ft import S2FTError
from s2ft.cli import data as command
from s2ft.data.examples import load_examples
from s2ft.data.masks import LONGEST, marked, spans
from s2ft.data.tokens import IGNORED, tokenize
from s2ft.finetune.preview import Preview, PreviewOptions, preview
from s2ft.runtime.models import load_tokenizer
from tiny_base import byte_tokenizer

BASE = Path(command.__file__).parents[1] / "demo" / "base"
RECORDS = [
    {"query": "2+3?", "reply": "5"},
    {"query": "1+1?", "reply": " "},
    {"query": "x" * 400, "reply": "y"},
    {"query": "0?", "reply": "z" * 300},
]
COLUMNS = {"prompt": "query", "completion": "reply"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return str(path)


def look(source: str, **options: object) -> Preview:
    return preview(
        PreviewOptions.parse({"model": str(BASE), "data": source, "map": COLUMNS, "max_length": 60, **options})
    )


def test_it_counts_what_a_run_would_train_on(source):
    found = look(source)
    tokens = tokenize(load_examples(source, columns=COLUMNS), load_tokenizer(str(BASE)), 60)
    lengths = [len(row) for row in tokens.dataset["input_ids"]]
    learned = sum(label != IGNORED for row in tokens.dataset["labels"] for label in row)
    assert (found.examples, found.usable, found.empty, found.too_long) == (4, len(tokens.dataset), 1, tokens.too_long)
    assert found.tokens == {**found.tokens, "total": sum(lengths), "longest": max(lengths), "learned": learned}
    assert found.taken == [
        f"{source}: 4 records with prompt, completion, taken as prompt and completion: the completion is learned"
    ]


def test_the_example_is_the_text_that_the_model_reads(source):
    (prompt, answer) = look(source).example
    assert prompt == ("2+3?", False)
    assert answer[1]
    assert answer[0].startswith("5")
    assert look(source, example="2").example[0][0] == "0?"
    with pytest.raises(S2FTError, match="example=9, but"):
        look(source, example="9")


def test_pairs_are_shown_too(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("query,chosen,rejected\n2+3?,5,6\n")
    found = look(str(path), objective="dpo", map={"prompt": "query"})
    assert (found.examples, found.usable) == (1, 1)
    assert found.example[0][0] == "2+3?"


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    with pytest.raises(S2FTError) as caught:
        PreviewOptions.parse({"model": "/no/model", "data": [str(tmp_path / "no.csv")], "map": "a", "limit": "0"})
    message = str(caught.value)
    for problem in (
        "map='a' must be pairs of a name and the data's column",
        "limit='0'",
        "no.csv': there is no such",
        "/no/model",
    ):
        assert problem in message


def test_the_command_prints_it_with_marks_and_writes_it(source, tmp_path):
    file = tmp_path / "preview.json"
    words = ["preview", source, "--model", str(BASE), "--map", "prompt=query,completion=reply", "--json", str(file)]
    printed = CliRunner().invoke(command.app, words, catch_exceptions=False).output
    assert "2+3?⟦5" in printed
    assert "1 have no response and are left out" in printed
    assert json.loads(file.read_text())["example"][0] == {"text": "2+3?", "learned": False}


def test_pieces_join_to_the_whole_text_whatever_is_learned():
    tokenizer, generator = byte_tokenizer(), random.Random(3)
    text = "Ünïcode: 2+3 = 5, 日本 and spaces   ."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for _ in range(20):
        labels = [token if generator.random() < 0.4 else IGNORED for token in ids]
        pieces = spans({"input_ids": ids, "labels": labels}, tokenizer)
        assert "".join(piece for piece, _ in pieces) == tokenizer.decode(ids)


def test_a_long_text_is_shown_by_its_ends():
    shown = marked([("a" * 3000, False), ("b" * 3000, True)])
    assert len(shown) < LONGEST + 20
    assert shown.startswith("aaa")
    assert shown.endswith("bbb⟧")
