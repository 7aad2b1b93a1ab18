"""`s2ft bench distributed` at a tiny size: what its rows say, and that engines agree with one process."""

import pytest

from s2ft.lab.bench import distributed

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


@pytest.mark.slow
def test_each_engine_has_a_row_for_each_method() -> None:
    report = distributed.bench_distributed(steps=3, rounds=2, length=8, budget=0.1, shapes=TINY)
    engines = [name for name in distributed.ENGINES if name not in report.settings["left_out"]]
    assert [(row["engine"], row["method"]) for row in report.rows] == [
        (name, method) for name in engines for method in ("s2ft", "lora")
    ]
    states = {(row["engine"], row["method"]): row["state_bytes"] for row in report.rows}
    for row in report.rows:
        assert row["error"] < 1e-4
        assert row["reloaded_equal"]
        assert 0 < row["step_ms_p20"] <= row["step_ms"] <= row["step_ms_p80"]
        assert distributed.distributed_line(row)["engine"] == row["engine"]
    assert states["fsdp2", "s2ft"] < 0.6 * states["ddp", "s2ft"]
