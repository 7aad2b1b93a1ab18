"""Resuming: the newest checkpoint, and whether it belongs to the run that is asked for.

Each checkpoint holds `run.json`, the options and the data digest of its run. A run that goes on must be the same run, or its
weights would be those of neither.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from s2ft.adapters.file import open_adapter
from s2ft.common.errors import S2FTError, first_line, raise_together
from s2ft.common.outputs import entries
from s2ft.common.reading import read_json
from s2ft.finetune.checkpoints import is_unfinished, whole_checkpoints
from s2ft.finetune.layout import AUTO, IN_PLACE, INDEXED
from s2ft.finetune.methods import METHODS, find_method
from s2ft.finetune.options import TrainOptions
from s2ft.finetune.reward_functions import rewards_digest
from s2ft.finetune.values import AUTO_RATE
from s2ft.format.config_file import method_of
from s2ft.format.terms import METHOD
from s2ft.runtime.processes import ALONE, DDP, ZERO, engine, process_count

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
MODEL_FILES = ("model.safetensors", "config.json")  # or, for a large model, the parts that its index names
INDEX = "model.safetensors.index.json"
STATE_FILES = ("scheduler.pt", "trainer_state.json")
OPTIMIZER = {  # engine → files that hold the optimizer's state, and with FSDP what is trained
    "fsdp2": ("optimizer.bin", "pytorch_model_fsdp.bin"),
    "fsdp2-sharded": ("optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata"),
    **dict.fromkeys(ZERO, ("latest",)),
}
NOTE = "run.json"  # in a checkpoint: options and data; in the output folder: the whole run card
TRAINED, FINISHED = "trained", "finished"  # a card's status: before base and result are asked, and after all
SETTLED = ("batch_size", "gradient_accumulation", "learning_rate")  # by the run, where they were left open
ASKING = {"evaluate", "eval_data", "eval_limit", "samples"}  # what base and result are asked
FREE = {"output", "resume", "log_every", "report_to", "save_every", "push_to_hub", *ASKING}  # do not change the weights


@dataclass(frozen=True)
class Paused:
    """A checkpoint and what it says of its run."""

    checkpoint: Path
    options: dict[str, Any]  # with a learning rate, which older notes left open
    digest: str  # of the data
    processes: int
    engine: str
    search: dict[str, Any] | None = None  # how its learning rate was found, where short runs did
    rewards: str | None = None  # digest of the files with its reward functions, where it has some
    reasons: Mapping[str, str] = field(default_factory=dict)  # for what it settled
    seconds: float = 0.0  # that it had trained for
    parts: Sequence[int] = ()  # the steps at which it began and went on; an older note has none
    given: Sequence[str] = ()  # of `SETTLED`

    @classmethod
    def read(cls, checkpoint: Path) -> Paused:
        """Reads what `Note` wrote.

        Raises:
            S2FTError: if it is not there, or of another form.
        """
        path = checkpoint / NOTE
        if not path.is_file():
            raise _incomplete(checkpoint, [NOTE])
        note = _read(path)
        options, data, processes = note.get("options"), note.get("data"), note.get("processes", 1)
        if not isinstance(options, dict) or not isinstance(data, dict) or not isinstance(data.get("digest"), str):
            raise _unreadable(path, "expected an object with options and data, with its digest")
        if processes not in range(1, 1 << 16):
            raise _unreadable(path, f"processes is {processes!r}")
        search = note.get("learning_rate_search")
        search = search if isinstance(search, dict) else None
        by = str(note.get("engine", DDP if processes > 1 else ALONE))
        return cls(
            checkpoint,
            settled_options(options),
            data["digest"],
            processes,
            by,
            search,
            note.get("rewards"),
            **_of_settling(note),
        )

    @property
    def method(self) -> str:
        """The method of its run."""
        return str(self.options.get("method", "s2ft"))

    @property
    def layout(self) -> str | None:
        """The layout that its run trains in: layouts round differently, so the run goes on in its own."""
        layout = self.options.get("layout")
        return layout if layout in (IN_PLACE, INDEXED) else None

    def settle(self, options: TrainOptions) -> TrainOptions:
        """The options, with what they leave open settled as in its run."""
        open_ones = [name for name in SETTLED if getattr(options, name) in (None, AUTO_RATE)]
        return options.model_copy(update={name: self.options.get(name) for name in open_ones})

    def check_same_run(self, options: TrainOptions, digest: str) -> None:
        """Raises `S2FTError` with every option that differs from its run, or if processes or data do."""
        defaults = {name: field.default for name, field in TrainOptions.model_fields.items() if not field.is_required()}
        before = {**defaults, **self.options}  # a note may be older than an option
        now = self.settle(options).model_dump(mode="json")
        if options.layout == AUTO:
            now["layout"] = before.get("layout")
        problems = [
            f"{name}={now[name]!r}, but {self.checkpoint} was made with {name}={before.get(name)!r}"
            for name in now
            if name not in FREE and before.get(name) != now[name]
        ]
        if not problems and self.processes != process_count():
            problems = [f"processes: {process_count()} here, but {self.checkpoint} was made with {self.processes}"]
        if not problems and self.engine != engine():
            problems = [f"engine: {engine()} here, but {self.checkpoint} was made by {self.engine}"]
        if not problems and self.digest != digest:
            problems = [f"data={options.data!r} has changed since {self.checkpoint} was made"]
        if not problems and self.rewards != rewards_digest(options.reward_function):
            problems = [f"reward_function={options.reward_function!r} has changed since {self.checkpoint} was made"]
        raise_together(problems)


def check_output(options: TrainOptions) -> Paused | None:
    """The run to go on with; None for a new one, whose output folder must be free.

    Raises:
        S2FTError: if there is something in the folder, or nothing to resume.
    """
    output = Path(options.output)
    if options.resume:
        return _newest(output, options)
    if output.is_dir() and not all(is_unfinished(path) or _is_left_over(path) for path in entries(output)):
        hint = "; add --resume to go on from its newest checkpoint" if whole_checkpoints(output) else ""
        raise S2FTError(f"output={options.output!r} exists and is not empty; name another folder{hint}")
    return None


def _is_left_over(path: Path) -> bool:
    """Whether a run that ended before its first checkpoint left it: its base's answers, or a tracker's curves."""
    files = [file for file in path.rglob("*") if file.is_file()]
    if path.is_dir() and path.name == "answers":
        return all(file.parent.name == "base" and file.suffix == ".jsonl" for file in files)
    return path.is_dir() and path.name == "runs" and all(file.name.startswith("events.out.tfevents") for file in files)


@dataclass(frozen=True)
class Note:
    """What is written down in each checkpoint of a run, so that it is known whose it is."""

    options: TrainOptions
    digest: str  # of the data
    prompts: str  # their format
    reasons: Mapping[str, str]  # for precision, batch, learning_rate and, with S²FT, layout
    given: Sequence[str]  # of `SETTLED`, by the user
    rewards: str | None  # digest of the reward functions' files, when they were loaded
    search: Mapping[str, Any] | None = None  # how short runs found the learning rate
    seconds: float = 0.0  # of training before the run went on
    parts: Sequence[int] = (0,)  # the steps at which it began and went on, as far as their seconds are known

    def write(self, checkpoint: Path, seconds: float) -> None:
        """Writes it, `seconds` after the training began or went on."""
        note = {
            "options": self.options.model_dump(mode="json"),
            "data": {"digest": self.digest, "format": self.prompts},
            "processes": process_count(),
            "engine": engine(),
            "reasons": dict(self.reasons),
            "given": list(self.given),
            "seconds": round(self.seconds + seconds, 3),
            "parts": list(self.parts),
            **({} if self.search is None else {"learning_rate_search": self.search}),
            **({} if self.rewards is None else {"rewards": self.rewards}),
        }
        (checkpoint / NOTE).write_text(json.dumps(note, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def given(options: TrainOptions) -> list[str]:
    """What of `SETTLED` is given, before anything is settled."""
    return [name for name in SETTLED if getattr(options, name) not in (None, AUTO_RATE)]


def _of_settling(note: dict[str, Any]) -> dict[str, Any]:
    """What a note says of how its run was settled; an older one says nothing."""
    reasons, seconds, named, parts = (note.get(name) for name in ("reasons", "seconds", "given", "parts"))
    reasons = reasons if isinstance(reasons, dict) else {}
    return {
        "parts": [step for step in parts if isinstance(step, int)] if isinstance(parts, list) else [],
        "reasons": {name: str(reasons[name]) for name in ("batch", "learning_rate") if name in reasons},
        "seconds": float(seconds) if isinstance(seconds, int | float) else 0.0,
        "given": [name for name in SETTLED if name in named] if isinstance(named, list) else [],
    }


def settled_options(noted: dict[str, Any]) -> dict[str, Any]:
    """The options of a note or run card. Older ones left the rate open where it was the paper's."""
    method = METHODS.get(noted.get("method", "s2ft"))
    if noted.get("learning_rate") is not None or method is None:
        return noted
    return {**noted, "learning_rate": method.learning_rate}


def _newest(output: Path, options: TrainOptions) -> Paused:
    checkpoints = whole_checkpoints(output)
    if (output / NOTE).is_file() and _read(output / NOTE).get("status") == FINISHED:
        raise S2FTError(f"output={options.output!r} holds a finished run; there is nothing to resume")
    if not checkpoints:
        raise S2FTError(f"output={options.output!r} has no checkpoint to resume from")
    paused = Paused.read(checkpoints[-1])
    if paused.method != options.method:  # asked first: other methods leave other files, which would be missed in vain
        raise S2FTError(f"method={options.method!r}, but {paused.checkpoint} was made with method={paused.method!r}")
    method = find_method(options.method)
    with method.resuming():  # its optimizer may hold more than tensors
        check_whole(paused, method.leaves_model)
    _check_best(paused.checkpoint)
    return paused


def _check_best(checkpoint: Path) -> None:
    """Raises `S2FTError` if the checkpoint with the lowest held-out loss is missing: its weights may be the result."""
    step = _read(checkpoint / "trainer_state.json").get("best_global_step")
    if step and not (checkpoint.parent / f"checkpoint-{step}").is_dir():
        raise S2FTError(
            f"{checkpoint.parent} has no checkpoint-{step} any more, whose held-out loss is the lowest so far"
        )


def check_whole(paused: Paused, is_model: bool) -> None:
    """Raises `S2FTError` for files that are missing or damaged: a checkpoint may have been copied or edited by hand."""
    checkpoint = paused.checkpoint
    weights, config = MODEL_FILES if is_model else ADAPTER_FILES
    parts = _parts(checkpoint) if is_model and (checkpoint / INDEX).is_file() else [weights]
    optimizer = OPTIMIZER.get(paused.engine, ("optimizer.pt",))
    states = [*optimizer, *STATE_FILES, *_random_states(paused.processes)]
    missing = [name for name in (*parts, config, *states) if not (checkpoint / name).is_file()]
    if missing:
        raise _incomplete(checkpoint, missing)
    for part in parts:
        try:
            with safe_open(checkpoint / part, framework="pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            raise _damaged(checkpoint, part, error) from None
    for name in states:
        if Path(name).suffix in (".pt", ".pth", ".bin"):
            _check_state(checkpoint, name)
    if not is_model and method_of(checkpoint) == METHOD:
        open_adapter(checkpoint)  # what is neither a slice nor declared would be loaded into the base


def _random_states(processes: int) -> list[str]:
    """Files with the states of the random number generators, one for each process."""
    return [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]


def _check_state(checkpoint: Path, name: str) -> None:
    """Checks torch's checksums, and the form of an optimizer's state; unpickles nothing but tensors."""
    try:
        with zipfile.ZipFile(checkpoint / name) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise S2FTError(f"the checksum of its part {broken} differs")
        if name == "optimizer.pt":
            state = torch.load(checkpoint / name, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(state, dict) or not {"state", "param_groups"} <= state.keys():
                raise S2FTError("it holds no state of an optimizer")
    except Exception as error:  # as many kinds as there are ways for an archive or a pickle to be broken
        raise _damaged(checkpoint, name, error) from None


def _incomplete(checkpoint: Path, missing: list[str]) -> S2FTError:
    text = f"{checkpoint} is incomplete: it has no {', '.join(missing)}"
    return S2FTError(f"{text}; remove it to resume from the one before")


def _damaged(checkpoint: Path, name: str, error: Exception) -> S2FTError:
    return S2FTError(
        f"{checkpoint / name} is damaged: {first_line(error)}; remove {checkpoint} to resume from the one before"
    )


def _parts(checkpoint: Path) -> list[str]:
    places = _read(checkpoint / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise _unreadable(checkpoint / INDEX, "expected a weight_map of names of files")
    return sorted({Path(name).name for name in places.values()})


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except S2FTError as error:
        raise _unreadable(path, str(error)) from None


def _unreadable(path: Path, reason: str) -> S2FTError:
    return S2FTError(f"{path} cannot be read, so this is no checkpoint of s2ft train: {reason}")
