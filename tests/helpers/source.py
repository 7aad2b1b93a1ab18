"""The modules of the package, and what they import."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "s2ft"
MODULES = sorted(SOURCE.rglob("*.py"))
FOLDERS = sorted(path.parent for path in SOURCE.rglob("__init__.py") if path.parent != SOURCE)


def imported(path: Path) -> list[str]:
    """Every `s2ft.*` module that a file imports, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "s2ft" else [node.module]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if name.startswith("s2ft.")]
