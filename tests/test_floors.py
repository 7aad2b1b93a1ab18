"""The floors of the house: a module imports its own floor and those below it, never one above."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "s2ft"
FLOORS = {"errors": 0, "files": 0, "locks": 0, "reading": 0, "method": 1, "adapter": 2, "work": 3, "demo": 4, "cli": 4}
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.stem in FLOORS)
LONGEST = 400  # lines; longer than that, a module has more than one idea


def floor(module: str) -> int:
    """Of a dotted name such as `s2ft.method.linear`."""
    return FLOORS[module.split(".")[1]]


def imported(path: Path) -> list[str]:
    """Every `s2ft.*` module that a file imports, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "s2ft" else [node.module]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if name.startswith("s2ft.")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down_the_floors_only(path: Path) -> None:
    own = FLOORS[path.relative_to(SOURCE).parts[0].removesuffix(".py")]
    assert [name for name in imported(path) if floor(name) > own] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_module_says_what_it_is_about_and_stays_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not text or ast.get_docstring(ast.parse(text))
    assert text.count("\n") <= LONGEST
