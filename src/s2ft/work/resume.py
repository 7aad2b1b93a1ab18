"""Resuming: the newest checkpoint, and whether it belongs to the run that is asked for.

Each checkpoint holds `run.json`, the options and the data digest of its run. A run that goes on must be the same run, or its
weights would be those of neither.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import get_last_checkpoint

from s2ft.errors import S2FTError, raise_together
from s2ft.work.options import TrainOptions

FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
    "run.json",
)
NOTE = "run.json"  # in a checkpoint: options and data; in the output folder: the whole run card
FREE = {"output", "resume", "log_every", "save_every"}  # options that do not change the weights


def check_output(options: TrainOptions) -> Path | None:
    """The checkpoint to go on from; None for a new run, whose output folder must be free.

    Raises:
        S2FTError: if there is something in the folder, or nothing to resume.
    """
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise S2FTError(f"output={options.output!r} is a file; name a folder that does not exist or is empty")
    _check_writable(output, options.output)
    if options.resume:
        return _newest(output, options.output)
    if output.is_dir() and any(output.iterdir()):
        can_resume = get_last_checkpoint(str(output)) is not None
        hint = "; add --resume to go on from its newest checkpoint" if can_resume else ""
        raise S2FTError(f"output={options.output!r} exists and is not empty; name another folder{hint}")
    return None


def note_run(checkpoint: Path, options: TrainOptions, digest: str) -> None:
    """Writes down which run a checkpoint is of."""
    note = {"options": options.model_dump(mode="json"), "data": {"digest": digest}}
    (checkpoint / NOTE).write_text(json.dumps(note, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_same_run(checkpoint: Path, options: TrainOptions, digest: str) -> None:
    """Raises `S2FTError` with every option that differs from the checkpoint's run, and if the data does."""
    note = _read_note(checkpoint / NOTE)
    before, now = note["options"], options.model_dump(mode="json")
    different = [name for name in now if name not in FREE and before.get(name) != now[name]]
    problems = [
        f"{name}={now[name]!r}, but {checkpoint} was made with {name}={before.get(name)!r}" for name in different
    ]
    if not problems and note["data"]["digest"] != digest:
        problems = [f"data={options.data!r} has changed since {checkpoint} was made"]
    raise_together(problems)


def _newest(output: Path, given: str) -> Path:
    checkpoint = get_last_checkpoint(given) if output.is_dir() else None
    if (output / NOTE).is_file() and _read(output / NOTE).get("status") == "finished":
        raise S2FTError(f"output={given!r} holds a finished run; there is nothing to resume")
    if checkpoint is None:
        raise S2FTError(f"output={given!r} has no checkpoint to resume from")
    _check_whole(Path(checkpoint))
    return Path(checkpoint)


def _check_writable(output: Path, given: str) -> None:
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise S2FTError(f"output={given!r} cannot be made: {str(nearest)!r} is not a folder that you may write to")


def _check_whole(checkpoint: Path) -> None:
    """Checkpoints appear whole, but what is copied or edited by hand may not be."""
    missing = [name for name in FILES if not (checkpoint / name).is_file()]
    if missing:
        raise S2FTError(
            f"{checkpoint} is incomplete: it has no {', '.join(missing)}; remove it to resume from the one before"
        )
    try:
        with safe_open(checkpoint / FILES[0], framework="pt") as adapter:
            adapter.keys()
    except SafetensorError as error:
        raise S2FTError(
            f"{checkpoint / FILES[0]} is damaged: {error}; remove {checkpoint} to resume from the one before"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from None
    if not isinstance(note, dict):
        raise _unreadable(path, f"expected an object, found {str(note)[:60]}")
    return note


def _read_note(path: Path) -> dict[str, Any]:
    """What `note_run` wrote."""
    note = _read(path)
    options, data = note.get("options"), note.get("data")
    if not isinstance(options, dict) or not isinstance(data, dict) or not isinstance(data.get("digest"), str):
        raise _unreadable(path, "expected an object with options and data, with its digest")
    return note


def _unreadable(path: Path, reason: str) -> S2FTError:
    return S2FTError(f"{path} cannot be read, so this is no checkpoint of s2ft train: {reason}")
