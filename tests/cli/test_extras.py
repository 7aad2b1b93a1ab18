"""A command whose extra is not installed says which, and nothing else."""

from pathlib import Path

import pytest

from commands import Command
from s2ft.demo import base_path

TRAIN = ["train", "-m", str(base_path()), "-d", "data.json", "-o", "new"]
EVAL = ["eval", "--model", str(base_path()), "--task", "boolq", "--data", "org/questions", "--output", "new"]

SERVE = ["serve", str(base_path())]


@pytest.mark.parametrize(
    ("words", "missing", "asked"),
    [
        (["--help"], "typer", "s2ft needs typer, which is not installed: pip install 's2ft[train]'"),
        (["merge", "a"], "typer", "s2ft merge needs typer, which is not installed: pip install 's2ft[train]'"),
        (["train", "--help"], "yaml", "s2ft train needs pyyaml, which is not installed: pip install 's2ft[train]'"),
        (TRAIN, "trl", "s2ft train needs trl, which is not installed: pip install 's2ft[train]'"),
        (["quickstart"], "trl", "s2ft quickstart needs trl, which is not installed: pip install 's2ft[train]'"),
        (EVAL, "datasets", "s2ft eval needs datasets, which is not installed: pip install 's2ft[eval]'"),
        (SERVE, "fastapi", "s2ft serve needs fastapi, which is not installed: pip install 's2ft[serve]'"),
        (["study", "fusion"], "trl", "s2ft study needs trl, which is not installed: pip install 's2ft[lab]'"),
        (
            ["inspect", "a", "--png", "a.png"],
            "matplotlib",
            "--png='a.png' needs matplotlib, which is not installed: pip install 's2ft[lab]'",
        ),
    ],
)
def test_the_missing_extra_is_named(words: list[str], missing: str, asked: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('[{"prompt": "1+1=", "completion": "2"}]')
    before = sorted(tmp_path.rglob("*"))
    command = Command(words, tmp_path.with_suffix(".log"), cwd=tmp_path, without=missing)
    assert (command.wait(), command.printed) == (2, f"error: {asked}\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_module_that_is_nobodys_is_a_bug(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "a" / name).write_text("{}")
    words = ["quickstart"]
    command = Command(words, tmp_path / "log", cwd=tmp_path, without="s2ft.demo.skills")
    assert command.wait() == 1
    assert "ModuleNotFoundError" in command.printed
