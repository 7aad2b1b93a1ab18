"""Bytes that are computed from shapes are those that `s2ft.sync` and an export really send."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from exported import save_base
from s2ft import S2FTError
from s2ft.cli.app import app
from s2ft.lab.bench.sync import bench_sync

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def test_what_is_computed_is_what_is_sent(tmp_path: Path) -> None:
    model = save_base(tmp_path / "base", "llama")
    rows = bench_sync(str(model), budget=0.05, shapes={"tiny": TINY}).rows
    assert [row["name"] for row in rows] == ["embedded", "base", "tiny"]
    for row in rows[:2]:
        assert row["sent"] == row["first"]
        assert row["exported_sent"] == row["exported"]
    assert rows[2]["sent"] is None
    for row in rows:
        size = {"bfloat16": 2, "float32": 4}[row["dtype"]]
        assert row["lora"] == size * row["trained"]
        assert row["first"] == row["later"] + row["lora"]
        assert row["lora"] < row["later"] < row["first"] < row["tensors"] < row["whole"]
        assert row["lora"] < row["exported"]


def test_a_folder_that_is_not_there_is_refused() -> None:
    with pytest.raises(S2FTError, match="nowhere"):
        bench_sync("nowhere")


def test_the_command_prints_a_table_and_writes_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_sync, "__defaults__", (None, 0.05, {"tiny": TINY}, lambda done: None))
    result = CliRunner().invoke(app, ["bench", "sync", "--budget", "0.05", "--json", str(tmp_path / "a.json")])
    assert result.exit_code == 0, result.output
    assert "first / whole" in result.output
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["embedded", "tiny"]
