"""Times calls, on a GPU until their work is done, and measures memory bandwidth.

    wait │ run │ wait            one time, in milliseconds
    p20 ──── median ──── p80     what a row tells of several

Benchmarks and the choice of a layout share these, so that their times mean the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil  # comes with accelerate
import torch

BANDWIDTH_TRIES = 6

_PERCENTILES = {"": 50, "_p20": 20, "_p80": 80}


def wait(device: str | torch.device) -> None:
    """Waits until a GPU has finished its work; does nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(run: Callable[[], Any], device: str | torch.device = "cpu") -> float:
    """The time of one call of `run`."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return 1e3 * (time.perf_counter() - start)


def spread(times: Sequence[float], name: str) -> dict[str, float]:
    """Median, 20th and 80th percentile, as the benchmarks' rows have them, in the unit of `times`.

    Example:
        >>> spread([1.0, 2.0, 3.0], "step_ms")
        {'step_ms': 2.0, 'step_ms_p20': 1.4, 'step_ms_p80': 2.6}
    """
    values: list[float] = np.percentile(times, list(_PERCENTILES.values())).tolist()
    return {f"{name}{end}": value for end, value in zip(_PERCENTILES, values, strict=True)}


def no_spread(name: str) -> dict[str, None]:
    """The keys of `spread` without values, for what could not be timed.

    Example:
        >>> no_spread("step_ms")
        {'step_ms': None, 'step_ms_p20': None, 'step_ms_p80': None}
    """
    return {f"{name}{end}": None for end in _PERCENTILES}


def bytes_per_ms(device: str, size: int) -> float:
    """Memory bandwidth: bytes read and written per millisecond by a copy of `size` bytes; the best of several."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(milliseconds(lambda: target.copy_(source), device) for _ in range(BANDWIDTH_TRIES))


def free_bytes(device: str) -> int:
    """Free memory on the device, in bytes."""
    if device != "cuda":
        return int(psutil.virtual_memory().available)
    set_aside = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # by torch, which gives it out again
    return torch.cuda.mem_get_info()[0] + set_aside
