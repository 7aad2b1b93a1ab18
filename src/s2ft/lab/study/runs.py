"""The runs of a study, kept: an interrupted study goes on where it stopped, and a changed setting is run anew.

runs.jsonl    {"digest": of the settings, base and versions, "settings": {...}, "result": {...}, "seconds": ...}
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from s2ft.common.errors import S2FTError
from s2ft.common.files import staged
from s2ft.common.outputs import check_place
from s2ft.demo import base_path
from s2ft.lab.registry import TellShare

Settings = dict[str, Any]
Result = dict[str, Any]

FILE = "runs.jsonl"
VERSIONS = ("s2ft", "torch", "transformers", "peft", "trl")


class Runs:
    """Runs of known settings, each done once.

    Args:
        folder: Where they are kept.
        total: How many there will be, for `tell`.

    Raises:
        S2FTError: if the folder cannot be one, or a line of its file is no run.
    """

    def __init__(self, folder: Path, total: int, tell: TellShare | None = None) -> None:
        check_place(folder, "runs")
        self.folder, self.total, self.tell = folder, total, tell
        self.seconds = 0.0  # of all runs of the study, whenever they were done
        self._asked = 0
        self._kept = _read(folder / FILE)

    def result(self, settings: Settings, run: Callable[[], Result]) -> Result:
        """What `run` returns; from the folder, if it was run with these settings before."""
        key = digest(settings)
        if key not in self._kept:
            start = time.perf_counter()
            result = run()
            seconds = round(time.perf_counter() - start, 3)
            self._kept[key] = {"digest": key, "settings": settings, "result": result, "seconds": seconds}
            self._write()
        self._asked += 1
        self.seconds += self._kept[key]["seconds"]
        if self.tell is not None:
            self.tell(self._asked / self.total)
        found: Result = self._kept[key]["result"]
        return found

    def _write(self) -> None:
        with staged(self.folder) as aside:
            lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in self._kept.values())
            (aside / FILE).write_text("".join(lines), encoding="utf-8")


def digest(settings: Settings) -> str:
    """SHA-256 of the settings, the base model and the versions of what runs them."""
    whole = {"settings": settings, "base": _base_digest(), "versions": {name: version(name) for name in VERSIONS}}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


@cache
def _base_digest() -> str:
    return hashlib.sha256((base_path() / "model.safetensors").read_bytes()).hexdigest()


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    kept = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            kept[entry["digest"]] = {name: entry[name] for name in ("digest", "settings", "result", "seconds")}
        except (ValueError, TypeError, KeyError):
            raise S2FTError(f"{path}:{number}: is no run of a study; remove the line, or name another folder") from None
    return kept
