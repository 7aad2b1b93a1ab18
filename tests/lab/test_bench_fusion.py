"""The fusion benchmark on a tiny shape: what it times is a fusion."""

import json
from pathlib import Path

from typer.testing import CliRunner

from s2ft.adapters.file import read_adapter
from s2ft.cli.app import app
from s2ft.lab.bench import fusion as module_under_test
from s2ft.lab.bench.fusion import _write_adapter

TINY = {"hidden_size": 24, "intermediate_size": 100, "num_hidden_layers": 2}


def test_the_adapters_are_adapters_and_differ(tmp_path: Path) -> None:
    first, second = (read_adapter(_write_adapter(tmp_path / name, TINY, seed)) for seed, name in enumerate("ab"))
    assert first.parameters == second.parameters == 2 * 3 * 24
    assert {path: str(chosen) for path, chosen in first.slices.items()} != {p: str(c) for p, c in second.slices.items()}


def test_a_row_has_times_their_floor_and_memory(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module_under_test.bench_fusion, "__defaults__", (1, TINY, lambda done: None))
    result = CliRunner().invoke(app, ["bench", "fusion", "--json", str(tmp_path / "a.json")])
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert 4 * 2 * 2 * 3 * 24 < row["bytes"] < 4 * 2 * 2 * 3 * 24 + 4000  # of the result: two slices of each layer
    assert 0 < row["fuse_ms_p20"] <= row["fuse_ms"] <= row["fuse_ms_p80"]
    assert row["floor_ms"] > 0
    assert row["memory"] > 0, "the child's own, not what is left above the peak of this process, which has held more"
