"""What the pages claim with a test: the test is there. Of s2ft, nothing is ticked without one."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / name for name in ("features.md", "support.md")]


def named(page: Path) -> list[str]:
    return re.findall(r"`(tests/[\w/]+\.py(?:::\w+)*)`", page.read_text(encoding="utf-8"))


def rows(page: Path) -> Iterator[list[str]]:
    """The cells of each row, without heads."""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith("| **"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def holds(mention: str) -> bool:
    path, *names = mention.split("::")
    if not (ROOT / path).is_file():
        return False
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    for name in names:
        found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
        if not found:
            return False
        body = found[0].body
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_test_that_is_named_exists(page: Path) -> None:
    assert len(named(page)) > 20
    assert [mention for mention in named(page) if not holds(mention)] == []


def test_no_tick_of_ours_is_without_a_test() -> None:
    ours = {cells[0]: cells[1] for cells in rows(PAGES[0]) if cells[1] != "s2ft"}
    assert len(ours) > 20
    for feature, cell in ours.items():
        assert cell.startswith("no") != bool(re.fullmatch(r"✓ `tests/\S+`", cell)), feature
