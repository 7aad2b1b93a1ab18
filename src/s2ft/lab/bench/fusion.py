"""How long does fusing two adapters take, on files, at LLaMA3-8B's shape? In a process of its own, which also tells its memory.

fuse     read both, check them, add them up, write the result to the disk
floor    write as many bytes as the result has to the disk
memory   the most that the process held, less what it held before
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from s2ft.format.config import S2FTConfig
from s2ft.format.names import delta_name, indices_name
from s2ft.format.slices import Slice
from s2ft.lab.bench.report import Report
from s2ft.lab.registry import TellShare
from s2ft.lab.shapes import LLAMA3_8B
from s2ft.runtime.timing import spread

RATIO = 0.03  # of the channels of down_proj, as in the paper

_CHILD = """
import json, sys, time, torch, s2ft
from pathlib import Path
from safetensors.torch import save_file
from s2ft.common.files import flush
from s2ft.runtime.memory import peak_of
first, second, output, floor = sys.argv[1:]
fused = []

def fuse():
    start = time.perf_counter()
    s2ft.fuse([first, second], output=output)
    fused.append(time.perf_counter() - start)

memory = peak_of(fuse, torch.device("cpu"))
size = Path(output, "adapter_model.safetensors").stat().st_size
tensors = {"all": torch.ones(size // 4)}
Path(floor).mkdir()
start = time.perf_counter()
save_file(tensors, floor + "/floor.safetensors")
flush(Path(floor))
written = time.perf_counter() - start
print(json.dumps({"fuse_ms": 1e3 * fused[0], "floor_ms": 1e3 * written, "bytes": size, "memory": memory}))
"""


def bench_fusion(
    repeats: int = 5,
    shape: dict[str, int] = LLAMA3_8B,
    tell: TellShare = lambda done: None,
) -> Report:
    """Fuses two adapters with different channels, `repeats` times; rows: fuse_ms, floor_ms (p20, p80), bytes, memory."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = [_write_adapter(Path(folder) / name, shape, seed) for seed, name in enumerate(("a", "b"))]
        runs = []
        for number in range(repeats):
            runs.append(_fuse([*adapters, Path(folder) / f"fused-{number}", Path(folder) / f"floor-{number}"]))
            tell((number + 1) / repeats)
    memory = max((run["memory"] for run in runs if run["memory"] is not None), default=None)  # only Linux keeps a peak
    row: dict[str, Any] = {"adapters": 2, "bytes": runs[0]["bytes"], "memory": memory}
    for name in ("fuse_ms", "floor_ms"):
        row |= spread([run[name] for run in runs], name)
    return Report(settings={"shape": shape, "ratio": RATIO, "dtype": "float32", "repeats": repeats}, rows=[row])


def _fuse(paths: Sequence[Path]) -> dict[str, float]:
    words = [sys.executable, "-W", "ignore", "-c", _CHILD, *map(str, paths)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    run: dict[str, float] = json.loads(done.stdout)
    return run


def _write_adapter(folder: Path, shape: dict[str, int], seed: int) -> Path:
    """Random deltas of random channels of every down_proj."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    channels, across = shape["intermediate_size"], shape["hidden_size"]
    tensors, slices = {}, {}
    for layer in range(shape["num_hidden_layers"]):
        path = f"model.layers.{layer}.mlp.down_proj"
        chosen = Slice(
            "in", np.sort(rng.choice(channels, max(1, round(RATIO * channels)), replace=False)).astype(np.int64)
        )
        slices[path] = str(chosen)
        tensors[delta_name(path)] = torch.randn(across, len(chosen.indices), generator=generator)
        tensors[indices_name(path)] = torch.from_numpy(chosen.indices)
    config = S2FTConfig(
        target_modules=["down_proj"], slices=slices, base_model_name_or_path="llama3-8b", task_type="CAUSAL_LM"
    )
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
