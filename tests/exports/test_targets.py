"""The registry of export targets: what its rows say is what happens. A new one: tests/house/test_contributing.py."""

import inspect
from pathlib import Path

import pytest
from typer.testing import CliRunner

import s2ft
from exported import save_adapter, save_base
from s2ft import S2FTError
from s2ft.cli.app import app
from s2ft.exports.targets import TARGETS, Writer, find_target


@pytest.mark.parametrize("name", TARGETS)
def test_every_row_has_a_module_with_the_two_functions(name: str) -> None:
    target, writer = find_target(name)
    assert target is TARGETS[name]
    for function in ("problems", "write"):
        expected = list(inspect.signature(getattr(Writer, function)).parameters)[1:]  # without self
        assert list(inspect.signature(getattr(writer, function)).parameters) == expected


@pytest.mark.parametrize("name", TARGETS)
def test_a_file_or_a_folder_is_written_as_the_row_says(name: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, {"o_proj": 0.5})
    target = TARGETS[name]
    output = tmp_path / f"out{target.suffix or ''}"
    done = s2ft.export(adapter, name, output)
    assert output.is_file() == (target.suffix is not None)
    assert (done.max_lora_rank is not None) == target.is_for_vllm


def test_help_and_errors_name_every_target() -> None:
    help_text = " ".join(CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "300"}).output.split())
    for name, target in TARGETS.items():
        assert f"{name}, for {target.taker}" in help_text
        assert target.suffix is None or f"{target.suffix} file for {name}" in help_text
    with pytest.raises(S2FTError, match=f"choose from {', '.join(TARGETS)}"):
        s2ft.export("nowhere", "none", "out")
