"""What a result was made with: library versions and machine, so that results can be compared."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from s2ft.common.extras import what_extras_lack
from s2ft.runtime.precision import choose_precision

LIBRARIES = ("s2ft", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


def environment() -> dict[str, Any]:
    """Versions of what is installed, and the machine, without any path or name of it."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):  # the core does without some
            found[name] = version(name)
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["cpu"] = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return found


def report() -> dict[str, Any]:
    """What a bug report needs: the environment, the precision that fits the machine, and which extras lack which packages."""
    return {**environment(), "precision": choose_precision("auto")[1], "extras": what_extras_lack()}


def peak_memory() -> dict[str, Any]:
    """Peak memory in bytes: of the GPU since `torch.cuda.reset_peak_memory_stats`, else of this process since its start."""
    if torch.cuda.is_available():
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(), "peak_memory_of": "GPU"}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if platform.system() == "Darwin" else 1024
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_memory_bytes": held, "peak_memory_of": "process"}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
