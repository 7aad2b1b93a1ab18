"""The command line as a person meets it: help, inspect, and how errors leave."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from peft import get_peft_model
from typer.testing import CliRunner

from families import build
from s2ft import S2FTConfig, S2FTError
from s2ft.cli.app import app, flags, main
from s2ft.cli.leaving import as_flags
from s2ft.common.outputs import check_writable

COMMANDS = (
    "quickstart",
    "train",
    "eval",
    "reproduce",
    "inspect",
    "fuse",
    "export",
    "merge",
    "serve",
    "bench selection",
    "bench switch",
    "bench fusion",
    "bench training",
    "bench parallel",
    "bench evaluation",
    "bench serve",
    "study selection",
    "study generalization",
    "study fusion",
    "study commonsense",
)


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


def test_inspect_prints_names_with_brackets(adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "a[/b]"}))
    result = CliRunner().invoke(app, ["inspect", str(copy)])
    assert result.exit_code == 0, result.exception
    assert "base: a[/b]" in result.output


def test_a_file_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(S2FTError, match="you may not write there"):
        check_writable(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "error: nowhere holds no adapter: there is no adapter_config.json"),
        (["inspect", "a", "--png", "nowhere/a.png"], "error: --png='nowhere/a.png': there is no folder 'nowhere'"),
        (["inspect", "a", "--png", "a.jpg"], "error: --png='a.jpg' must end in .png"),
        (["inspect", "a", "--json", "."], "error: --json='.' is a folder; name a file"),
        (["quickstart", "--json", "nowhere/a.json"], "there is no folder 'nowhere'"),
        (["bench", "selection", "--json", "."], "error: --json='.' is a folder; name a file"),
        (["bench", "training", "--png", "a.jpg"], "error: --png='a.jpg' must end in .png"),
        (["bench", "training", "--preset", "9b"], "'9b' is not one of 'cpu', '7b'"),
        (["bench", "training", "--liger"], "--liger needs a preset for GPUs, such as 7b"),
        (["inspect"], "error: Missing argument"),
        (["train", "--ratios", "1.5", "--epochs", "x"], "--ratios=1.5 is outside (0, 1]"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(s2ft, arguments, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, told = s2ft(*arguments)
    assert code == 2
    assert message in told
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "message", "told"),
    [
        ("merge", "base='x' is a folder", "--base='x' is a folder"),
        ("inspect", "model='x' is not a folder", "--base='x' is not a folder"),  # as the reader of models calls it
        ("train", "model='x' is not a folder", "--model='x' is not a folder"),
        ("train", "lower batch_size=4, or set gradient_checkpointing", "lower --batch-size=4, or set --gradient-checkpointing"),
        ("train", "2:\n  - data is missing: x\n  - ratios['q']=2", "2:\n  - --data is missing: x\n  - --ratios['q']=2"),
        ("train", "a/limit=3: the model's 'limit=3', o_proj=2", "a/limit=3: the model's 'limit=3', o_proj=2"),
        ("bench training", "liger=True needs a GPU", "--liger needs a GPU"),
        ("study fusion", "runs='x' is a file", "--runs='x' is a file"),
        ("export", "epochs=3", "epochs=3"),
    ],
)  # fmt: skip
def test_errors_name_the_options_of_the_command(command: str, message: str, told: str) -> None:
    assert as_flags(message, flags(command.split())) == told


def test_short_options_stand_for_the_long_ones(s2ft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("epochs: x")
    code, _, told = s2ft("train", "-m", "./m", "-d", "d.json", "-o", "o", "-c", "a.yaml")
    assert code == 2
    assert told.splitlines()[1:] == [
        "  - --epochs='x': input should be a valid number, unable to parse string as a number",
        "  - --data='d.json': there is no such file",
        "  - --model='./m' is not a folder; name the folder of a model, a .gguf file, or a model on the Hub",
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_that_people_expect_short_is(command: str) -> None:
    found = typer.main.get_command(app)
    for word in command.split():
        found = found.commands[word]
    for parameter in found.params:
        for name in {"--model", "--data", "--output", "--config"} & set(parameter.opts):
            assert name[1:3] in parameter.opts


def test_the_shell_can_complete(s2ft) -> None:
    code, shown, _ = s2ft("--show-completion", "bash")
    assert code == 0
    assert "COMP_WORDS" in shown


def test_a_process_leaves_with_the_message_alone(tmp_path: Path) -> None:
    program = [str(Path(sys.executable).parent / "s2ft"), "inspect", "nowhere"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: nowhere holds no adapter: there is no adapter_config.json\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_encoding_of_the_terminal_will_do(
    encoding: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table with ‖Δ‖, and paths with what the encoding may lack."""
    folder = shutil.copytree(adapter, tmp_path / "Δ名")
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding))
    monkeypatch.setattr(sys, "argv", ["s2ft", "fuse", str(folder), "--json", str(tmp_path / "rows.json")])
    with pytest.raises(SystemExit) as left:
        main()
    sys.stdout.flush()
    assert not left.value.code
    assert b"channels in 6 modules are shared" in printed.getvalue()
    assert json.loads((tmp_path / "rows.json").read_text())["modules"] == 6
    monkeypatch.setattr(sys, "argv", ["s2ft", "inspect", str(adapter)])
    with pytest.raises(SystemExit) as left:
        main()
    sys.stdout.flush()
    assert not left.value.code
    assert {"ascii": b" ??? ", "cp1252": b" ??? ", "utf-8": " ‖Δ‖ ".encode()}[encoding] in printed.getvalue()
