"""Commands of s2ft in processes of their own, forked from one that has imported everything: for attacks that start hundreds."""

import hashlib
import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

_IMPORTED = [
    "s2ft.cli.app",
    "s2ft.work.train",
    "s2ft.adapter.export",
    "s2ft.work.eval.run",
    "matplotlib.figure",
    "gguf",
]
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "open")  # what Python tells its audit hooks about files


class Command:
    """A command that runs.

    Args:
        words: What is typed after `s2ft`.
        log: Takes what it prints.
        die_at: Kills itself before it does so many things to files below `within`.
    """

    def __init__(self, words: list[str], log: Path, die_at: int | None = None, within: Path | None = None) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(_IMPORTED)
        self.log = log
        self.process: BaseProcess = server.Process(target=_main, args=(words, str(log), die_at, str(within)))
        self.process.start()

    def kill(self) -> None:
        self.process.kill()
        self.wait()

    def wait(self) -> int:
        """Its exit code; -9 if it was killed."""
        self.process.join(120)
        assert self.process.exitcode is not None
        return self.process.exitcode

    @property
    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def contents(path: Path) -> dict[str, str]:
    """Every file of a folder, or the file itself, with the digest of its bytes; nothing if nothing is there."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _main(words: list[str], log: str, die_at: int | None, within: str) -> None:
    import torch

    from s2ft.cli.app import main

    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    if die_at is not None:
        _die_at(die_at, within)
    sys.argv = ["s2ft", *words]
    main()


def _die_at(count: int, within: str) -> None:
    left = count

    def look(event: str, args: tuple[object, ...]) -> None:
        nonlocal left
        if event in _CHANGES and str(args[0]).startswith(within):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
