"""The rooms of the house: every folder has a map that is true. That imports go down only is import-linter's to check."""

import ast
import re
from pathlib import Path

import pytest

from source import FOLDERS, MODULES, SOURCE

LONGEST = 400  # lines; longer than that, a module has more than one idea


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_module_says_what_it_is_about_and_stays_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert text.count("\n") <= LONGEST


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_folder_opens_with_a_map_of_its_files(folder: Path) -> None:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    assert text is not None
    mapped = re.findall(r"^ *(\w+) {2,}\S", text, flags=re.MULTILINE)
    below = [path for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert sorted(mapped) == sorted(path.stem for path in below if path.stem != "__init__")


def test_the_tests_lie_as_the_folders_do() -> None:
    of_several = {"attacks", "gpu", "helpers", "hosts", "house", "engines", "peft_suite"}
    folders = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()}
    tests = {path.name for path in (SOURCE.parents[1] / "tests").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert tests == folders | of_several
