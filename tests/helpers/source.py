"""The modules of the package, and what they import."""

import ast
import sys
from pathlib import Path

from packaging.utils import canonicalize_name

SOURCE = Path(__file__).parents[2] / "src" / "s2ft"
MODULES = sorted(SOURCE.rglob("*.py"))
FOLDERS = sorted(path.parent for path in SOURCE.rglob("__init__.py") if path.parent != SOURCE)


def imported(path: Path) -> list[str]:
    """Every `s2ft.*` module that a file imports, inside functions too."""
    return [name for name in _imports(path) if name.startswith("s2ft.")]


def libraries(path: Path) -> set[str]:
    """Every package from elsewhere that a file imports, inside functions too, as an index of packages spells it."""
    tops = {name.partition(".")[0] for name in _imports(path)} - sys.stdlib_module_names - {"s2ft", "s2ft_command"}
    return {canonicalize_name({"yaml": "pyyaml"}.get(top, top)) for top in tops}


def _imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "s2ft" else [node.module]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names
