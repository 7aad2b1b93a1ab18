"""Whole checkpoints: a folder is marked while it is written, and one with the mark is never resumed from.

    checkpoint-40/          whole: `run.json` says which run it is of
    checkpoint-60/
        unfinished          the mark: being written, or left by a run that was killed; the next run removes the folder

transformers writes what is in a checkpoint. What is here happens around that: the mark, and which checkpoints are kept.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from s2ft.common.files import flush, flush_names
from s2ft.runtime.processes import wait_for_all

KEPT = 2  # the newest ones: the older is whole while the newer is written
_MARK = "unfinished"
_STEP = re.compile(r"checkpoint-(\d+)")


def mark(checkpoint: Path) -> None:
    """To be called before anything is written; in every process, as each may be the first to write."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / _MARK).touch()


def is_unfinished(folder: Path) -> bool:
    """Whether it is a checkpoint with the mark, or empty: a run may be killed before it can set the mark."""
    return is_checkpoint(folder) and folder.is_dir() and ((folder / _MARK).exists() or not any(folder.iterdir()))


def is_checkpoint(folder: Path) -> bool:
    """Whether the path has the name of a checkpoint.

    Example:
        >>> is_checkpoint(Path("out/checkpoint-40")), is_checkpoint(Path("out/checkpoint-best"))
        (True, False)
    """
    return _STEP.fullmatch(folder.name) is not None


def step_of(checkpoint: Path) -> int:
    """The number of steps after which it was written.

    Example:
        >>> step_of(Path("out/checkpoint-40"))
        40
    """
    return int(checkpoint.name.partition("-")[2])


def whole_checkpoints(output: Path) -> list[Path]:
    """The checkpoints that a run may go on from, the newest last."""
    return sorted((path for path in _checkpoints(output) if not is_unfinished(path)), key=step_of)


def remove_unfinished(output: Path) -> None:
    """Removes the checkpoints that were not written to their end."""
    for path in _checkpoints(output):
        if is_unfinished(path):
            _remove(path)


def _checkpoints(output: Path) -> list[Path]:
    return [path for path in output.glob("checkpoint-*") if is_checkpoint(path) and path.is_dir()]


def best_checkpoint(output: Path, state: TrainerState) -> Path | None:
    """Where the checkpoint with the lowest held-out loss lies; None before anything was measured."""
    return output / f"checkpoint-{state.best_global_step}" if state.best_global_step else None


class Checkpoints(TrainerCallback):
    """Finishes each checkpoint that the trainer writes and removes older ones.

    Args:
        note: Adds files of ours to a checkpoint, so many seconds after the training began or went on.
    """

    def __init__(self, note: Callable[[Path, float], None]) -> None:
        self.note, self._began = note, time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks for the best checkpoint in the output folder, which may have moved since that was written."""
        self._began = time.perf_counter()
        best = best_checkpoint(Path(args.output_dir), state)
        state.best_model_checkpoint = None if best is None else str(best)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes the mark away once every process has written its part."""
        wait_for_all()
        if state.is_world_process_zero:
            output = Path(args.output_dir)
            checkpoint = output / f"checkpoint-{state.global_step}"
            (checkpoint / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing of ours reads
            self.note(checkpoint, time.perf_counter() - self._began)
            flush(checkpoint)  # the contents reach the disk before the mark goes
            (checkpoint / _MARK).unlink()
            flush_names(checkpoint)
            for old in whole_checkpoints(output)[:-KEPT]:
                if old != best_checkpoint(output, state):
                    _remove(old)
        wait_for_all()


def _remove(checkpoint: Path) -> None:
    """The mark goes last, so that a checkpoint that is removed half-way does not count as whole."""
    with suppress(OSError):  # a full disk has no place for the mark
        mark(checkpoint)
    for path in checkpoint.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != _MARK:
            path.unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)
