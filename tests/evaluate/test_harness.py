"""The lm-evaluation-harness on our models and adapters; with the real package where it is installed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from s2ft import S2FTConfig
from s2ft.cli.app import app
from s2ft.evaluate import harness
from s2ft.runtime.models import load_model


def adapters(base: str, folder: Path) -> list[str]:
    configs = {"ours": S2FTConfig(ratios=0.5, init_weights=False), "lora": LoraConfig(r=4, init_lora_weights=False)}
    for name, config in configs.items():
        get_peft_model(load_model(base, torch.float32), config).save_pretrained(folder / name)
    return [str(folder / name) for name in configs]


def test_without_the_package_it_says_what_to_install(base, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = CliRunner().invoke(app, ["eval", "--model", base, "--harness", "lm-eval", "--task", "arc_easy"])
    assert "pip install 's2ft[eval]'" in str(result.exception)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--harness", "helm"], "harness='helm' is unknown; there is lm-eval"),
        (["--harness", "lm-eval"], "name at least one"),
    ],
)
def test_bad_input(base, words, message) -> None:
    assert message in str(CliRunner().invoke(app, ["eval", "--model", base, *words]).exception)


def test_rows_are_the_harness_metrics() -> None:
    results = {
        "tiny": {
            "alias": "tiny",
            "acc,none": 0.5,
            "acc_stderr,none": "N/A",
            "em,strict": 1,
            "em_stderr,strict": 0.1,
        }
    }
    found = list(harness._rows({"results": results, "n-samples": {"tiny": {"effective": 4}}}))
    first = {"task": "tiny", "metric": "acc", "filter": "none", "value": 0.5, "stderr": None, "questions": 4}
    assert found == [first, {**first, "metric": "em", "filter": "strict", "value": 1, "stderr": 0.1}]


def test_it_evaluates_a_task_of_ones_own(base, tmp_path) -> None:
    pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed")
    lines = [{"question": f"{n}+{n}=", "choices": [str(2 * n), "x"], "gold": 0} for n in range(4)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny_sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'docs.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    folders, rows = adapters(base, tmp_path / "adapters"), tmp_path / "rows.json"
    words = [
        "--model",
        base,
        "--harness",
        "lm-eval",
        "--task",
        "tiny_sums",
        "--data",
        str(tmp_path),
        "--json",
        str(rows),
    ]
    words += [word for folder in folders for word in ("--adapter", folder)]
    result = CliRunner().invoke(app, ["eval", *words, "--precision", "fp32"])
    assert result.exit_code == 0, result.exception
    found = json.loads(rows.read_text())["rows"]
    assert [(row["model"], row["task"], row["metric"], row["questions"]) for row in found] == [
        ("ours", "tiny_sums", "acc", 4),
        ("lora", "tiny_sums", "acc", 4),
    ]
    unknown = CliRunner().invoke(app, ["eval", "--model", base, "--harness", "lm-eval", "--task", "nope"])
    assert "task='nope' is unknown to lm-eval" in str(unknown.exception)
