"""Commands of s2ft in processes of their own, forked from one that has imported everything: a start costs nothing then."""

import hashlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.abc import MetaPathFinder
from multiprocessing.process import BaseProcess
from pathlib import Path

_IMPORTED = [
    "s2ft.cli.app",
    "s2ft.finetune.train",
    "s2ft.exports.export",
    "s2ft.evaluate.run",
    "matplotlib.figure",
    "gguf",
]
_CHANGES: dict[str, list[tuple[int, ...]]] = {
    # what Python tells its audit hooks about files: where each path stands, and the folder that it is relative to
    "open": [(0,)],
    "os.truncate": [(0,)],
    "os.mkdir": [(0, 2)],
    "os.remove": [(0, 1)],
    "os.rmdir": [(0, 1)],
    "os.symlink": [(1, 2)],
    "os.link": [(0, 2), (1, 3)],
    "os.rename": [(0, 2), (1, 3)],
}


class Command:
    """A command that runs.

    Args:
        words: What is typed after `s2ft`; or a program in Python.
        log: Takes what it prints.
        die_at: Kills itself before it does so many things to files below `within`.
        within: A folder; what is done to files there is noted in `changes`.
        stop_at: Stops itself before it touches the file below `within` that is called so, until a SIGCONT.
        cwd: The folder that it runs in.
        without: A package that is not installed there, as far as it can see.
    """

    def __init__(
        self,
        words: list[str] | str,
        log: Path,
        die_at: int | None = None,
        within: Path | None = None,
        stop_at: str | None = None,
        cwd: Path | None = None,
        without: str | None = None,
    ) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(_IMPORTED)
        self.log, self.noted = log, log.with_name(f"{log.name}.changes")
        attack = partial(_watch, within.resolve(), str(self.noted), die_at, stop_at) if within else None
        self.process: BaseProcess = server.Process(target=_main, args=(words, log, cwd, without, attack))
        self.process.start()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> int:
        self.process.kill()
        return self.wait()

    def signal(self, number: int) -> "Command":
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        return self

    def wait(self) -> int:
        """Its exit code; -9 if it was killed."""
        self.process.join(120)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"it hung, and was killed; it printed: {self.printed}")
        return self.process.exitcode

    @property
    def is_stopped(self) -> bool:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    @property
    def changes(self) -> list[str]:
        """What it did to files below `within`: the event's name and its paths."""
        return self.noted.read_text(encoding="utf-8").splitlines()

    @property
    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def contents(path: Path) -> dict[str, str]:
    """Every file of a folder, or the file itself, with the digest of its bytes; nothing if nothing is there."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def wait_for(condition: Callable[[], bool], command: Command, seconds: float = 90) -> None:
    """Until the command has come so far; fails if it ends before, or takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert command.process.is_alive(), command.printed
        if time.monotonic() > end:
            command.kill()
            raise AssertionError(f"nothing happened in time; it printed: {command.printed}")
        time.sleep(0.005)


def _main(
    words: list[str] | str, log: Path, cwd: Path | None, without: str | None, attack: Callable[[], None] | None
) -> None:
    import torch

    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    if cwd is not None:
        os.chdir(cwd)
    if without is not None:
        _forget(without)
    if attack is not None:
        attack()
    if isinstance(words, str):
        exec(compile(words, "program", "exec"), {"__name__": "__main__"})
    else:
        import s2ft_command

        sys.argv = ["s2ft", *words]
        s2ft_command.main()


def _forget(package: str) -> None:
    """As if it were not installed, and nothing of s2ft were loaded yet."""
    for name in [*sys.modules]:
        if name.startswith((f"{package}.", "s2ft.")) or name in (package, "s2ft"):
            del sys.modules[name]
    sys.meta_path.insert(0, _Missing(package))


class _Missing(MetaPathFinder):
    """Finds nothing in a package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == self.package or fullname.startswith(f"{self.package}."):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def _watch(within: Path, noted: str, die_at: int | None, stop_at: str | None) -> None:
    notes = os.open(noted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count, waits = 0, stop_at is not None

    def look(event: str, args: tuple[object, ...]) -> None:
        nonlocal count, waits
        paths = [path for path in _paths(event, args) if path.is_relative_to(within)]
        if not paths:
            return
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if waits and any(path.name == stop_at for path in paths):
            waits = False
            os.kill(os.getpid(), signal.SIGSTOP)
        os.write(notes, " ".join([event, *map(str, paths)]).encode() + b"\n")
        count += 1

    sys.addaudithook(look)


def _paths(event: str, args: tuple[object, ...]) -> Iterator[Path]:
    """The files that an event is about."""
    for place, *folder in _CHANGES.get(event, []):
        path, above = args[place], args[folder[0]] if folder else -1
        named = _opened(path) if isinstance(path, int) else Path(os.fsdecode(path))  # type: ignore[arg-type]
        yield named if above == -1 else _opened(above) / named


def _opened(descriptor: object) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
