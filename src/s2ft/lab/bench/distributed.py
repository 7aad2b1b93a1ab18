"""Two processes of the CPU under each engine: the weights of one process, the memory of each, and time, beside LoRA.

For each of DDP, FSDP2 (torch's own), ZeRO-2 and ZeRO-3 (DeepSpeed, where it is installed), in fp32:

    error           ‖ours − one process's‖ / ‖one process's‖ of what was trained in 20 steps, the worst tensor
    reloaded_equal  the saved adapter on a fresh base holds exactly what was trained
    state_bytes     weights, what is trained, and Adam's moments, in the first process
    saved_bytes     kept for backward (not with FSDP2 and ZeRO-3, whose gathered weights would count, too)
    step_ms         in turns with LoRA of as many parameters, in one run; `time_ratio` is S²FT's by LoRA's
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from s2ft.common.errors import S2FTError
from s2ft.lab.bench import divided
from s2ft.lab.bench.report import Report
from s2ft.training.in_place import in_place

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
SHAPES = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 2048,
}  # fmt: skip
NO_DEEPSPEED = "DeepSpeed is not installed: `make test-distributed` has it, in build/distributed"


def bench_distributed(
    steps: int = 20,
    rounds: int = 15,
    length: int = 128,
    rows: int = 4,
    budget: float = 0.01,
    shapes: dict[str, int] | None = None,
    tell: Callable[[float], Any] = lambda done: None,
) -> Report:
    """Rows: one for each engine and method."""
    settings: dict[str, Any] = {"steps": steps, "rounds": rounds, "length": length, "rows": rows, "budget": budget}
    settings |= {"shapes": SHAPES if shapes is None else shapes}
    lacking = [] if find_spec("deepspeed") else [name for name in ENGINES if name.startswith("zero")]
    names = [name for name in ENGINES if name not in lacking]
    found: list[dict[str, Any]] = []
    with TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        for method in divided.METHODS:
            _alone(method, settings, folder / f"alone-{method}-beside the layers", nullcontext)
        _alone("s2ft", settings, folder / "alone-s2ft-in place", in_place)
        for number, name in enumerate(names):
            found += _by_engine(name, folder)
            tell((number + 1) / len(names))
    return Report(settings=settings | {"left_out": dict.fromkeys(lacking, NO_DEEPSPEED)}, rows=found)


def distributed_line(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is printed."""
    saved = row["saved_bytes"]
    return {
        "engine": row["engine"],
        "method": row["method"],
        "layout": row["layout"],
        "error": f"{row['error']:.1e}",
        "reloaded": "equal" if row["reloaded_equal"] else "differs",
        "state, MB": row["state_bytes"] / 1e6,
        "saved, MB": None if saved is None else saved / 1e6,
        "step, ms": row["step_ms"],
        "of LoRA's": row["time_ratio"],
    }


def _alone(method: str, settings: dict[str, Any], folder: Path, layout: Callable[[Any], Any]) -> None:
    """What one process trains on all rows, in the layout: the two round differently."""
    model = divided.make(method, settings)
    with layout(model):
        step = divided.plain_step(model, divided.adam(model))
        for ids in divided.batches(settings, settings["steps"]):
            step(ids)
        model.save_pretrained(str(folder))


def _by_engine(name: str, folder: Path) -> list[dict[str, Any]]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "-m", divided.__name__, name, str(folder)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            **_variables(name),
        },
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise S2FTError(f"the processes of {name} failed: {done.stderr[-2000:]}")
    rows: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    times = {row["method"]: row["step_ms"] for row in rows}
    for row in rows:
        row["error"] = _error(folder / f"{name}-{row['method']}", folder / f"alone-{row['method']}-{row['layout']}")
        row["time_ratio"] = row["step_ms"] / times["lora"]
    return rows


def _variables(name: str) -> dict[str, str]:
    """What accelerate's launcher says of the engine."""
    if name.startswith("zero"):
        return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": name.removeprefix("zero")}
    return {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if name == "fsdp2" else {}


def _error(ours: Path, expected: Path) -> float:
    mine, theirs = (load_file(place / "adapter_model.safetensors") for place in (ours, expected))
    errors = [_relative(mine[name], tensor) for name, tensor in theirs.items() if tensor.is_floating_point()]
    return float(np.max(errors))  # NaN, if one is


def _relative(tensor: Tensor, expected: Tensor) -> float:  # of any shape
    return float(torch.linalg.vector_norm(tensor - expected) / torch.linalg.vector_norm(expected))
