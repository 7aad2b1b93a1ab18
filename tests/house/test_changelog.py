"""The changelog names the tests that hold what it claims: they exist, and are spelled in one way."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MENTIONS = re.findall(r"[^\s(),;]*(?:\btest_|\w*::)[^\s(),;]*", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))


def test_every_test_that_the_changelog_names_exists() -> None:
    assert len(MENTIONS) > 100
    known = {name for file in (ROOT / "tests").glob("*/test_*.py") for name in names(file)}
    assert [mention for mention in MENTIONS if mention.rstrip(":.") not in known] == []


def names(file: Path) -> set[str]:
    """As the changelog spells them: the file's, and those of its tests and classes."""
    path = file.relative_to(ROOT)
    found = {f"`{path}`"}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(f"`{path}::{node.name}`")
        if isinstance(node, ast.ClassDef):
            methods = (inner.name for inner in node.body if isinstance(inner, ast.FunctionDef))
            found |= {f"`{path}::{node.name}::{method}`" for method in methods}
    return found
