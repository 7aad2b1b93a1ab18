"""`s2ft bench switch` at tiny dimensions: every contestant does what it says; how long it takes is not asserted."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from s2ft import S2FTError
from s2ft.cli.app import app
from s2ft.lab.bench import switch as bench
from s2ft.lab.bench.switch import CHANNELS, RANK, TIMED, bench_switch, contestants, draw_switch, switch_line

KEYS = {"device", "dim", "s2ft_ms", "lora_ms", "floor_ms", "bandwidth_ms", "rounds", "skipped"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LARGE", 1 << 12)


def test_rows_have_what_the_design_names() -> None:
    report = bench_switch(dims=(40, 64), rounds=3, seconds=0).as_dict()
    cpu = [row for row in report["rows"] if row["device"] == "cpu"]
    assert [row["dim"] for row in cpu] == [40, 64]
    for row in report["rows"]:
        assert set(row) >= KEYS
        assert row["rounds"] == 3
        for name in TIMED:
            assert 0 < row[f"{name}_ms_p20"] <= row[f"{name}_ms"] <= row[f"{name}_ms_p80"]
        assert switch_line(row).keys() == switch_line(cpu[0]).keys()
    assert report["settings"]["channels"] == CHANNELS
    assert {"torch", "python", "cpu"} <= set(report["environment"])
    json.dumps(report, allow_nan=False)


def test_both_methods_train_as_many_weights() -> None:
    dim = 4096
    assert CHANNELS * dim == 2 * RANK * dim


def test_contestants_do_what_is_timed_under_their_names() -> None:
    turns = contestants("cpu", 48)
    write = turns["s2ft"][1]
    layer = write.__closure__[0].cell_contents
    weight = layer.base_layer.weight
    before = weight.clone()
    for name in ("s2ft", "s2ft_call"):
        prepare, run, undo = turns[name]
        prepare()
        run()
        torch.testing.assert_close(weight - before, layer.get_delta_weight("a"))
        undo()
        assert torch.equal(weight, before)
        layer.set_adapter("a")
    prepare, run, undo = turns["s2ft_back"]
    prepare()
    assert not torch.equal(weight, before)
    run()
    assert torch.equal(weight, before)
    turns["floor"][1]()
    assert torch.equal(weight, before)  # the same columns
    turns["lora"][1]()
    added = weight - before
    assert int(torch.linalg.matrix_rank(added.double(), rtol=1e-4)) == RANK
    turns["lora_fused"][1]()  # takes away what `lora` added: the same product
    torch.testing.assert_close(weight, before, rtol=1e-4, atol=1e-6)
    _, run, undo = turns["peft"]
    run()
    assert int(torch.linalg.matrix_rank((weight - before).double(), rtol=1e-4)) == RANK
    undo()
    torch.testing.assert_close(weight, before, rtol=1e-4, atol=1e-6)


def test_a_dimension_that_does_not_fit_has_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "free_bytes", lambda device: 16 * 50 * 50)
    rows = bench_switch(dims=(48, 4096), rounds=3, seconds=0).rows
    fits, skipped = rows[:2]
    assert skipped["s2ft_ms"] is None
    assert skipped["rounds"] == 0
    assert skipped["skipped"].startswith("needs 0 GB")
    assert fits["skipped"] is None
    assert set(skipped) == set(fits)
    assert switch_line(skipped).keys() == switch_line(fits).keys()
    draw_switch(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = bench_switch(dims=(40,), rounds=3, seconds=0)
    monkeypatch.setattr(bench, "bench_switch", lambda tell, device: tell(1.0) or tiny)
    png, rows = tmp_path / "a.png", tmp_path / "a.json"
    result = CliRunner().invoke(app, ["bench", "switch", "--json", str(rows), "--png", str(png)])
    assert result.exit_code == 0, result.exception
    assert json.loads(rows.read_text())["rows"] == tiny.rows
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(S2FTError, match=r"device='cuda': there is no CUDA GPU here; take device='cpu'"):
        bench_switch(device="cuda")
