"""A run of four steps with everything that its page shows."""

import json
from pathlib import Path

import pytest

from s2ft.finetune.options import parse_options
from s2ft.finetune.train import TrainResult
from tiny_base import save_tiny_base
from tiny_runs import train


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    folder = tmp_path_factory.mktemp("run")
    rows = [{"prompt": f"{n}+{n}=", "completion": f"<b>{2 * n}</b> & more"} for n in range(30)]
    (folder / "sums.json").write_text(json.dumps(rows))
    options = {"model": str(save_tiny_base(folder / "base")), "data": str(folder / "sums.json")}
    options |= {"output": str(folder / "out"), "max_steps": 4, "log_every": 1, "holdout": 6, "validate_every": 1}
    options |= {"samples": 2, "ratios": {"o_proj": 0.25, "down_proj": 0.1}, "precision": "fp32", "layout": "indexed"}
    options |= {"strategy": "weight"}  # learns enough in four steps to answer otherwise
    return train(parse_options(options))


@pytest.fixture(scope="package")
def page(finished: TrainResult) -> str:
    return Path(finished.output / "report.html").read_text(encoding="utf-8")
