"""Benchmarks run at a tiny shape and report what they should; how long anything takes is not asserted."""

from s2ft.lab.bench.selection import bench_selection, shared_layers

TINY = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}


def test_selection_reports_each_strategy_and_the_floor() -> None:
    report = bench_selection(repeats=2, shape=TINY).as_dict()
    assert [row["strategy"] for row in report["rows"]] == ["floor", "random", "weight"]
    assert all(0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"] for row in report["rows"])
    assert report["settings"]["shape"] == TINY
    assert {"torch", "python", "cpu"} <= set(report["environment"])


def test_all_layers_share_the_first_ones_weights() -> None:
    model = shared_layers(TINY)
    storages = {layer.mlp.down_proj.weight.data_ptr() for layer in model.model.layers}
    assert len(storages) == 1
    assert not model.model.layers[2].mlp.down_proj.weight.is_meta
