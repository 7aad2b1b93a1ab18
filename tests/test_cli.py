"""The command line as a person meets it: help, inspect, and how errors leave."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from typer.testing import CliRunner

from families import build
from s2ft import S2FTConfig
from s2ft.cli.app import app

COMMANDS = ("quickstart", "train", "inspect", "bench selection")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(build("qwen2", torch.float32), S2FTConfig(ratios=0.5, init_weights=False)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert f"s2ft {command}" in result.output


def test_inspect_prints_draws_and_writes(adapter: Path, tmp_path: Path) -> None:
    png, rows = tmp_path / "a.png", tmp_path / "a.json"
    result = CliRunner().invoke(app, ["inspect", str(adapter), "--png", str(png), "--json", str(rows)])
    assert result.exit_code == 0, result.output
    assert "self_attn.o_proj" in result.output
    facts = json.loads(rows.read_text())
    assert f"{facts['weights']:,} weights in {len(facts['rows'])} modules" in result.output
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "error: nowhere holds no adapter: there is no adapter_config.json"),
        (["inspect"], "error: Missing argument"),
        (["train", "--ratios", "1.5", "--epochs", "x"], "ratios=1.5 is outside (0, 1]"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    program = [sys.executable, "-W", "ignore", "-m", "s2ft.cli.app", *arguments]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
