"""`s2ft bench parallel` at a tiny shape: what is compared is comparable, and reported as it should be."""

from pathlib import Path
from typing import Any

import pytest
import torch

from s2ft.lab.bench import parallel
from s2ft.lab.bench.parallel import TIMED, bench_parallel, channels, contestants, draw_parallel, parallel_line

TINY = {"o_proj": (64, 64), "down_proj": (224, 64)}


def report(counts: tuple[int, ...]) -> dict[str, Any]:
    return bench_parallel(counts, TINY, rounds=2, seconds=0, large=1 << 12).as_dict()


def test_rows(tmp_path: Path) -> None:
    heard: list[float] = []
    found = bench_parallel((1, 3), TINY, rounds=2, seconds=0, large=1 << 12, tell=heard.append).as_dict()
    rows = [row for row in found["rows"] if row["device"] == "cpu"]
    assert [(row["dtype"], row["adapters"], row["batch"]) for row in rows] == [
        (dtype, count, count) for dtype in ("float32", "bfloat16") for count in (1, 3)
    ]
    for row in rows:
        assert row["dim"] == 64
        assert row["floor_ms"] > 0
        for name in TIMED:
            assert 0 < row[f"{name}_ms_p20"] <= row[f"{name}_ms"] <= row[f"{name}_ms_p80"]
    assert heard[-1] == 1
    assert found["settings"]["channels"] == {"o_proj": 32, "down_proj": 72}
    draw_parallel(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000
    line = parallel_line(rows[0])
    assert line["s2ft / lora"] == f"{rows[0]['s2ft_ms'] / rows[0]['lora_ms']:.2f}"


def test_what_does_not_fit_is_a_row_that_says_so(tmp_path: Path) -> None:
    rows = report((1, 10**10))["rows"]
    assert rows[0]["skipped"] is None
    assert "GB" in rows[1]["skipped"]
    assert all(rows[1][f"{name}_ms"] is None for name in (*TIMED, "floor"))
    assert parallel_line(rows[1])["s2ft / lora"] == "–"
    draw_parallel(rows, tmp_path / "p.png")


def test_peft_is_left_out_where_it_would_take_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "MOST_IN_PEFT", 2)
    row = report((3,))["rows"][0]
    assert row["peft_ms"] is None
    assert row["lora_ms"] > 0


@torch.no_grad()
def test_all_compute_what_they_claim() -> None:
    calls = contestants("cpu", torch.float32, 3, TINY)
    ours, theirs = calls["layer"](), calls["peft"]()
    assert [tuple(y.shape) for y in ours] == [tuple(y.shape) for y in theirs] == [(3, 1, 64)] * 2
    for y, own in zip(calls["s2ft"](), ours, strict=True):  # adds to zeros
        torch.testing.assert_close(y, own)
        assert own.abs().min() > 0
    for y, own, other in zip(calls["lora"](), ours, theirs, strict=True):  # adds to the same y
        torch.testing.assert_close(y, own + other, atol=1e-3, rtol=1e-4)
        assert not torch.equal(other[0], other[1])


@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 4096), (14336, 4096), (11008, 4096)])
def test_parameters_are_equal(inputs: int, outputs: int) -> None:
    lora = parallel.RANK * (inputs + outputs)
    assert abs(channels(inputs, outputs) * outputs - lora) < outputs
