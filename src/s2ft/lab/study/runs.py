"""The runs of a study, kept: an interrupted study goes on where it stopped, and a changed setting is run anew.

runs.jsonl    {"digest": of the settings, base and versions, "settings": {...}, "result": {...}, "seconds": ...}
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

from s2ft.common.errors import S2FTError
from s2ft.common.files import staged
from s2ft.common.outputs import check_place
from s2ft.demo import base_path
from s2ft.lab.registry import TellShare
from s2ft.runtime.environment import environment

Settings = dict[str, Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Done:
    """A run that has been made: what it returned, and where and how fast."""

    result: Result
    seconds: float
    environment: dict[str, Any]


Performer = Callable[[list[Settings]], Iterable[tuple[int, Done]]]
"""From settings to (place among them, what was done), in any order."""

FILE = "runs.jsonl"
VERSIONS = ("s2ft", "torch", "transformers", "peft", "trl")


class Runs:
    """Runs of known settings, each done once.

    Args:
        folder: Where they are kept.
        total: How many there will be, for `tell`.
        identity: What a run depends on besides its settings; the embedded base and the versions of what runs it unless given.

    Raises:
        S2FTError: if the folder cannot be one, or a line of its file is no run.
    """

    def __init__(
        self, folder: Path, total: int, tell: TellShare | None = None, identity: Settings | None = None
    ) -> None:
        check_place(folder, "runs")
        self.folder, self.total, self.tell = folder, total, tell
        self._identity, self._lock = identity, Lock()
        self._asked: dict[str, int] = {}  # digest → how often; parts of a study may ask for the same run
        self._kept = _read(folder / FILE)
        if identity is not None:
            self._check_version(identity["version"])

    def _check_version(self, version: Any) -> None:
        for entry in self._kept.values():
            found = entry.get("identity", {}).get("version")
            if found != version:
                raise S2FTError(
                    f"runs={str(self.folder)!r} holds runs of version {found} of the study, and this is version {version}; "
                    "name another folder"
                )

    def has(self, settings: Settings) -> bool:
        """Whether a run of these settings is kept."""
        return digest(settings, self._identity) in self._kept

    def result(self, settings: Settings, run: Callable[[], Result]) -> Result:
        """What `run` returns; from the folder, if it was run with these settings before."""
        return self.results([settings], lambda asked: [(0, timed(run))] if asked else [])[0]

    def results(self, asked: Sequence[Settings], perform: Performer) -> list[Result]:
        """What the runs of these settings return, in order; those that are not kept yet are performed, and kept one by one."""
        keys = [digest(settings, self._identity) for settings in asked]
        with self._lock:
            new = {key: settings for key, settings in zip(keys, asked, strict=True) if key not in self._kept}
            for key in keys:
                if key not in new:
                    self._count(key)
        wanted = list(new)
        for place, done in perform(list(new.values())):
            self._keep(wanted[place], new[wanted[place]], done)
        return [self._kept[key]["result"] for key in keys]

    def _keep(self, key: str, settings: Settings, done: Done) -> None:
        entry = {"digest": key, "settings": settings, "result": done.result, "seconds": done.seconds}
        if self._identity is not None:
            entry |= {"identity": self._identity, "environment": done.environment}
        with self._lock:  # several threads of a study may wait for runs
            self._kept[key] = entry
            self._write()
            self._count(key)

    @property
    def seconds(self) -> float:
        """Of all runs that were asked for, whenever they were done."""
        return float(sum(self._kept[key]["seconds"] for key in self._asked))

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Where the runs that were asked for were made, each place once."""
        found = {json.dumps(self._kept[key]["environment"], sort_keys=True) for key in self._asked}
        return [json.loads(text) for text in sorted(found)]

    def _count(self, key: str) -> None:
        self._asked[key] = self._asked.get(key, 0) + 1
        if self.tell is not None:
            self.tell(min(1.0, sum(self._asked.values()) / self.total))

    def _write(self) -> None:
        with staged(self.folder) as aside:
            lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in self._kept.values())
            (aside / FILE).write_text("".join(lines), encoding="utf-8")


def timed(run: Callable[[], Result]) -> Done:
    """Runs, and says how long it took."""
    start = time.perf_counter()
    result = run()
    return Done(result, round(time.perf_counter() - start, 3), environment())


def digest(settings: Settings, identity: Settings | None = None) -> str:
    """SHA-256 of the settings and of `identity`: the embedded base and the versions of what runs them unless given."""
    whole = {"settings": settings, **(_embedded() if identity is None else identity)}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _embedded() -> Settings:
    return {"base": _base_digest(), "versions": {name: version(name) for name in VERSIONS}}


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
            kept[entry["digest"]] = {**entry, **{name: entry[name] for name in ("settings", "result", "seconds")}}
        except (ValueError, TypeError, KeyError):
            raise S2FTError(f"{path}:{number}: is no run of a study; remove the line, or name another folder") from None
    return kept
