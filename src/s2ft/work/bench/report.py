"""What every benchmark returns: environment, settings, rows; and how it times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from s2ft.work.environment import environment


@dataclass(frozen=True)
class Report:
    """A benchmark's result; `as_dict` is what `--json` writes."""

    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    environment: dict[str, Any] = field(default_factory=environment)

    def as_dict(self) -> dict[str, Any]:
        """Environment, settings and rows."""
        return {"environment": self.environment, "settings": self.settings, "rows": self.rows}


def milliseconds(run: Callable[[], Any], repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Median, 20th and 80th percentile of the time that `run` takes, in ms."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    median, low, high = np.percentile(times, [50, 20, 80])
    return {"ms": float(median), "ms_p20": float(low), "ms_p80": float(high)}
