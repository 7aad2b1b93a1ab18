"""Which private names of other libraries the package uses, found in its source: nobody has to remember to list one.

module._forward_hooks                 an attribute of something else than `self`
self._replace_module, def _apply      a name that a base class from a library has
getattr(model, "_hf_hook", None)      a name in a text
from library import _name             an import, also of a public name out of a private module
"""

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from source import MODULES, SOURCE

PRIVATE = re.compile(r"_[A-Za-z]\w*")
OWN_ROOTS = ("s2ft", "builtins", "typing", "abc")
ASKING = ("getattr", "setattr", "hasattr", "delattr")


@cache
def private_names() -> dict[str, list[str]]:
    """Each name with the places where it is used, as `layer/linear.py:204`."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
    found: dict[str, list[str]] = {}
    for path, tree in trees.items():
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        own = {name for node in classes for name, _ in _in_class(node)}  # as in `other._value` where classes compare
        used = ((name, line) for name, line in _used(tree) if name not in own)
        for name, line in (*used, *(use for node in classes for use in _inherited(path, node))):
            found.setdefault(name, []).append(f"{path.relative_to(SOURCE)}:{line}")
    return found


def _inherited(path: Path, cls: ast.ClassDef) -> Iterator[tuple[str, int]]:
    """What a class of ours takes or overrides of a library's class."""
    theirs = _of_libraries(path, cls.name)
    return ((name, line) for name, line in _in_class(cls) if name in theirs)


def _of_libraries(path: Path, name: str) -> set[str]:
    """The attributes of the library classes that a class of ours is derived from."""
    module = ".".join(("s2ft", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    try:
        cls = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:  # of an extra that is not installed here
        if (error.name or "").startswith("s2ft"):
            raise
        return set()
    bases = [base for base in getattr(cls, "__mro__", ()) if base.__module__.partition(".")[0] not in OWN_ROOTS]
    held = {attribute for base in bases for attribute in vars(base)}
    return held | {name for base in bases for name in getattr(base, "__annotations__", ())} | _set_by(bases)


def _set_by(bases: list[type]) -> set[str]:
    """What their methods set on `self`."""
    methods = (method for base in bases for method in vars(base).values() if hasattr(method, "__code__"))
    return {name for method in methods for name in method.__code__.co_names if PRIVATE.fullmatch(name)}


def _in_class(cls: ast.ClassDef) -> Iterator[tuple[str, int]]:
    """Private attributes in a class's body, each with its line."""
    for node in ast.walk(cls):
        if isinstance(node, ast.FunctionDef) and PRIVATE.fullmatch(node.name):
            yield node.name, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and PRIVATE.fullmatch(node.id):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr) and _is_self(node.value):
            yield node.attr, node.lineno


def _is_self(node: ast.expr) -> bool:
    return ast.unparse(node) in ("self", "cls", "super()")


def _used(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr) and not _is_self(node.value):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom):
            from_private = any(map(PRIVATE.fullmatch, (node.module or "").split(".")))
            names = [alias.name for alias in node.names]
            yield from ((name, node.lineno) for name in names if from_private or PRIVATE.fullmatch(name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ASKING:
            yield from _texts(node.args[1:2])
        elif isinstance(node, ast.Tuple):
            yield from _texts(node.elts)


def _texts(nodes: list[ast.expr]) -> Iterator[tuple[str, int]]:
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and PRIVATE.fullmatch(node.value):
            yield node.value, node.lineno
