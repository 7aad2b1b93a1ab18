"""Names → adapters: those in the folder, and what they come to when they are fused.

    "math"                          the adapter in DIR/math
    "math+code"                     both, fused as by `s2ft fuse math code`
    fuse {"math": 0.5, "code": 1}   fused as by `s2ft fuse math code --weights 0.5,1`
    the base's own name             the base

A name is looked up among those that the folder had, so none leads out of it. An adapter that was replaced on disk is another
version, with a key of its own in the pool: answers under way keep the one that they began with.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from s2ft.adapters.fusion import fuse
from s2ft.common.errors import raise_together
from s2ft.exports.vllm_plugin import adapter_folder
from s2ft.tuner.mixing import BASE

FUSIONS = 32  # that are kept; the least recently used goes
MOST_FUSED = 8  # adapters in one fusion
_log = logging.getLogger("s2ft.serve")


@dataclass(frozen=True)
class Chosen:
    """What a request is answered by."""

    label: str  # for the client
    key: str = BASE  # in the pool
    folder: Path | None = None


class UnknownModelError(Exception):
    """There is no model by that name."""


class TooManyError(Exception):
    """More adapters than one fusion may have."""


class Adapters:
    """The adapters of a server; for one thread, but for `fused`.

    Args:
        base: What clients call the base.
        root: The folder of adapter folders.
        retire: Takes a key from the pool once nobody uses it, and then calls back.

    Raises:
        S2FTError: if an adapter has the base's name.
    """

    def __init__(self, base: str, root: Path | None, retire: Callable[[str, Callable[[], None]], None]) -> None:
        self.base, self._root, self._retire = base, root, retire
        found = [] if root is None else sorted(path.name for path in root.iterdir() if _folder(root, path.name))
        raise_together(name_problems(base, found))
        self._versions: dict[str, Chosen | None] = dict.fromkeys(found)  # name → what was given out last
        self._fusions: OrderedDict[str, Chosen] = OrderedDict()
        self._fusing = threading.Lock()
        self._scratch = tempfile.TemporaryDirectory(prefix="s2ft-fusions-")
        self._count = 0

    @property
    def names(self) -> list[str]:
        """The adapters that can be asked for."""
        return list(self._versions)

    def recipe(self, model: str, weights: Mapping[str, float] | None = None) -> dict[str, float]:
        """Adapters and their weights that a request names; none for the base.

        Raises:
            UnknownModelError: if it names something else.
            TooManyError: if it names more than `MOST_FUSED` adapters.
        """
        if weights is not None:
            if model != self.base or not weights or not set(weights) <= set(self._versions):
                raise UnknownModelError
            return dict(weights)
        if model == self.base:
            return {}
        parts = [model] if model in self._versions else model.split("+")
        if len(parts) > MOST_FUSED:
            raise TooManyError
        if not set(parts) <= set(self._versions) or len(set(parts)) < len(parts):
            raise UnknownModelError
        return dict.fromkeys(parts, 1.0)

    def choose(self, recipe: Mapping[str, float]) -> Chosen | None:
        """What answers; None if it has to be `fused` first.

        Raises:
            UnknownModelError: if an adapter is not in the folder any more.
        """
        if not recipe:
            return Chosen(self.base)
        if [*recipe.values()] == [1.0]:
            (name,) = recipe
            return self._version(name)
        found = self._fusions.get(self.fusion_key(recipe))
        if found is not None:
            self._fusions.move_to_end(found.key)
        return found

    def fused(self, recipe: Mapping[str, float]) -> tuple[str, Path]:
        """Fuses adapters, as `s2ft fuse` does; may take its time, and run in another thread. Give the result to `keep`.

        Raises:
            S2FTError: if they cannot be fused.
            UnknownModelError: if an adapter is not in the folder any more.
        """
        with self._fusing:
            key = self.fusion_key(recipe)
            folders = [self.place(name) for name in recipe]
            self._count += 1
            output = Path(self._scratch.name) / str(self._count)
            fuse(folders, list(recipe.values()), output=output)
            return key, output

    def keep(self, recipe: Mapping[str, float], key: str, folder: Path) -> Chosen:
        """A fusion that was just made, for this request and later ones."""
        if key in self._fusions:  # two requests made it at once
            shutil.rmtree(folder, ignore_errors=True)
            return self._fusions[key]
        chosen = self._fusions[key] = Chosen(label(recipe), key, folder)
        while len(self._fusions) > FUSIONS:
            _, old = self._fusions.popitem(last=False)
            self._forget(old)
        return chosen

    def add(self, name: str) -> bool:
        """Takes an adapter that lies in the folder; whether there is one."""
        if self._root is None or name == self.base or _folder(self._root, name) is None:
            return False
        self._versions.setdefault(name, None)
        return True

    def remove(self, name: str) -> bool:
        """Answers no more by an adapter; whether there was one."""
        if name not in self._versions:
            return False
        if (last := self._versions.pop(name)) is not None:
            self._retire(last.key, lambda: None)
        return True

    def close(self) -> None:
        """Removes what was fused."""
        self._scratch.cleanup()

    def _version(self, name: str) -> Chosen:
        last = self._versions.get(name)  # of one that was taken away meanwhile, `place` says so
        if last is not None and self._root is not None and last.key == _key(name, self._root / name):
            return last  # by its name, not by `last.folder`: a link may lead to another folder now
        folder = self.place(name)
        chosen = self._versions[name] = Chosen(name, _key(name, folder), folder)
        if last is not None and last.key != chosen.key:
            self._retire(last.key, lambda: None)
        return chosen

    def fusion_key(self, recipe: Mapping[str, float]) -> str:
        """What tells a fusion from others: weights, and files as they are now.

        Raises:
            UnknownModelError: if an adapter is not in the folder any more.
        """
        return "/".join(f"{weight!r}*{_key(name, self.place(name))}" for name, weight in recipe.items())

    def place(self, name: str) -> Path:
        """The folder of an adapter that can be asked for.

        Raises:
            UnknownModelError: if there is none, or it is not there any more.
        """
        if name not in self._versions:
            raise UnknownModelError
        folder = None if self._root is None else _folder(self._root, name)
        if folder is None:
            raise UnknownModelError
        return folder

    def _forget(self, old: Chosen) -> None:
        folder = old.folder
        assert folder is not None
        self._retire(old.key, lambda: shutil.rmtree(folder, ignore_errors=True))


def name_problems(base: str, adapters: Iterable[str]) -> list[str]:
    """That an adapter has the base's name: the base would answer in its place.

    Example:
        >>> name_problems("math", ["code"])
        []
    """
    found = [name for name in adapters if name == base]
    return [f"the adapter {name!r} has the name of the base; give the base another: name=..." for name in found]


def label(recipe: Mapping[str, float]) -> str:
    """What a fusion is called in answers.

    Example:
        >>> label({"math": 1.0, "code": 1.0}), label({"math": 0.5, "code": 0.25})
        ('math+code', '0.5*math+0.25*code')
    """
    return "+".join(name if weight == 1 else f"{weight:g}*{name}" for name, weight in recipe.items())


def _folder(root: Path, name: str) -> Path | None:
    """The adapter's folder; None for what is no adapter, is being written, or lies elsewhere."""
    hidden = name.startswith((".", "__")) or "/" in name or "\\" in name
    return None if hidden else adapter_folder(root, name)


def _key(name: str, folder: Path) -> str:
    """The adapter in the pool: another key once it is replaced, or a link leads to another folder.

    Raises:
        UnknownModelError: if it is gone.
    """
    try:
        found = [(folder / file).stat() for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
    except OSError:
        raise UnknownModelError from None
    return "/".join(
        [name, str(folder.resolve()), *(f"{one.st_ino:x}.{one.st_mtime_ns:x}.{one.st_size:x}" for one in found)]
    )
