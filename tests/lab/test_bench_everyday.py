"""The benchmark of everyday things measures what it says."""

import sys
from pathlib import Path

import pytest

from s2ft import S2FTError
from s2ft.lab.bench import everyday

BASE = Path(everyday.__file__).parents[2] / "demo" / "base"


def test_the_floor_reads_and_writes_and_leaves_nothing(tmp_path):
    (tmp_path / "in").write_bytes(b"x" * 1000)
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_bytes(b"y" * 1000)
    assert everyday._floor([tmp_path / "in"], [out / "a"]) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_the_same_examples_are_written_each_time(tmp_path):
    one, two = (everyday._written(tmp_path / name, everyday._chat_record, 3).read_text() for name in "ab")
    assert one == two
    assert one.count("\n") == 3


def test_what_cannot_be_measured_is_said_before_anything_is(tmp_path, monkeypatch):
    monkeypatch.setattr(everyday, "_adapters", lambda *_: pytest.fail("measured"))
    with pytest.raises(S2FTError, match="examples=0 must be 1 or more"):
        everyday.bench_everyday(examples=0)
    with pytest.raises(S2FTError, match="must be a folder with a model in safetensors"):
        everyday.bench_everyday(str(tmp_path))
    with pytest.raises(S2FTError, match="why it failed"):
        everyday._run([sys.executable, "-c", "import sys; sys.exit('why it failed')"])


@pytest.mark.slow
def test_a_row_for_each_thing():
    rows = everyday.bench_everyday(str(BASE), examples=20, repeats=1).rows
    assert [row["what"] for row in rows] == [
        *("inspect", "fuse", "merge", "export", "load", "prepare text", "prepare chat"),
    ]
    for row in rows:
        assert row["seconds"] > (row["imports_s"] or 0) > 0 or row["imports_s"] is None
        assert row["ratio"] == row["seconds"] / row["floor_s"]
        assert everyday.everyday_line(row)["what"] == row["what"]
