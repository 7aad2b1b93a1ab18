"""A command whose extra is not installed says which, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

from s2ft.demo import base_path

TRAIN = ["train", "-m", str(base_path()), "-d", "data.json", "-o", "new"]
EVAL = ["eval", "--model", str(base_path()), "--task", "boolq", "--data", "org/questions", "--output", "new"]

SERVE = ["serve", str(base_path())]

WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == missing else PathFinder.find_spec(name, path, target)

missing = sys.argv.pop(1)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
import s2ft_command
s2ft_command.main()
"""


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
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT, missing, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {asked}\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_module_that_is_nobodys_is_a_bug(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "a" / name).write_text("{}")
    program = (
        "import sys; sys.modules['s2ft.demo.skills'] = None; sys.argv = ['s2ft', 'quickstart']\n"
        "import s2ft_command; s2ft_command.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr
