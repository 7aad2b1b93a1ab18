"""How `s2ft` starts: the command line answers before torch and PEFT are there, and nobody meets PEFT without the method."""

import ast
import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import s2ft
from s2ft.cli.importing import importing
from source import MODULES, SOURCE, imported

HEAVY = {"torch", "peft", "transformers", "trl", "datasets", "matplotlib", "accelerate"}
PEFTS_OWN = {"peft_methods"}  # modules that hand over configs of PEFT's own methods alone
HANDS_OVER = {"PeftModel.from_pretrained", "get_peft_model", "HFLM", "SFTTrainer"}


def called(path: Path) -> set[str]:
    """What a module calls, as it is written there."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["--show-completion", "bash"],
        ["train", "--help"],
        ["eval", "--help"],
        ["train", "--lerning-rate", "1"],
        ["train", "--ratios", "1.5", "--layers", "x"],
        ["train", "-m", "no-such-folder", "-d", "nowhere.json", "-o", "new"],
        ["train", "-m", "no-such-folder", "-d", "data.json", "-o", "new"],
        ["train", "-m", "./no-such-folder", "-d", "data.json", "-o", "new", "--evaluate", "boolq", "--eval-data", "a"],
        ["eval", "-m", "./no-such-folder", "-d", "org/set", "-o", "new", "--task", "gsm8k"],
        ["reproduce", "no-such-recipe", "-d", "org/set", "-o", "new"],
        ["serve", "--help"],
        ["serve", "./no-such-folder", "--adapters", "nowhere"],
        ["inspect", "nowhere"],
        ["fuse", "nowhere", "nowhere"],
        ["merge", "nowhere", "-o", "new"],
        ["export", "nowhere", "--to", "lora", "-o", "new"],
    ],
)
def test_help_a_misspelt_option_and_a_missing_file_need_no_heavy_library(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[]")
    program = (
        f"import os, sys; os.chdir({str(tmp_path)!r}); sys.argv = ['s2ft', *{words}]\n"
        "import s2ft_command\n"
        "try: s2ft_command.main()\n"
        "except SystemExit as left: print('left:', left.code, 'loaded:', *sys.modules)"
    )
    code, _, loaded = run(program).rpartition("left:")[2].partition("loaded:")
    plain = {"--help", "--version", "--show-completion"} & set(words)
    assert int(code) == (0 if plain else 2)
    assert "s2ft.finetune.options" in loaded.split()
    assert set(loaded.split()) & HEAVY == set()


def test_the_package_makes_peft_know_the_method_and_leaves_what_only_commands_need() -> None:
    program = (
        "import sys, s2ft\n"
        "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as known\n"
        "print('S2FT' in known)\n"
        "for name in s2ft.__all__: getattr(s2ft, name)\n"
        "print(*sys.modules)"
    )
    is_known, modules = run(program).splitlines()
    assert is_known == "True"
    assert not {"trl", "datasets", "matplotlib", "pydantic", "typer", "rich"} & set(modules.split())


def test_every_public_name_is_where_the_package_says() -> None:
    for name in s2ft.__all__:
        assert getattr(s2ft, name).__name__ == name
    assert set(s2ft.__all__) < set(dir(s2ft))
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", s2ft.__version__)
    with pytest.raises(AttributeError, match="no attribute 'fusion_reactor'"):
        _ = s2ft.fusion_reactor


def relies_on_registration(path: Path) -> bool:
    return path.stem not in PEFTS_OWN and bool(called(path) & HANDS_OVER)


@pytest.mark.parametrize("path", [path for path in MODULES if relies_on_registration(path)], ids=lambda path: path.stem)
def test_who_hands_models_to_peft_has_registered_the_method(path: Path) -> None:
    """On the command line `import s2ft` does not: a module that relies on it says so by an import."""
    assert SOURCE / "tuner" / "model.py" in closure(path, {path})


def closure(path: Path, seen: set[Path]) -> set[Path]:
    """Every module of ours that a module's imports lead to."""
    for name in imported(path):
        found = file_of(name)
        if found is not None and found not in seen:
            seen.add(found)
            closure(found, seen)
    return seen


def file_of(name: str) -> Path | None:
    """Of `s2ft.tuner.model`, or of something in it."""
    parts = name.split(".")[1:]
    files = (SOURCE.joinpath(*parts[:count]).with_suffix(".py") for count in range(len(parts), 0, -1))
    return next((file for file in files if file.is_file()), None)


def test_the_collector_of_cycles_is_back_after_imports() -> None:
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()
