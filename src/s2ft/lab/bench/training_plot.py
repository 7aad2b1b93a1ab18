"""The picture of `s2ft bench training`: time and memory, against the length of the sequences and against the batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

AXES = (("seq_len", "tokens in a sequence", "batch_size"), ("batch_size", "sequences in a batch", "seq_len"))


def draw_training(rows: Sequence[Row], path: Path) -> None:
    """Writes a row of panels for each model: time and memory at the main batch size, then at the main length.

    Memory is the GPU's peak where it was measured, else what is saved for backward. Rows without a time (out of memory) are
    left out, and so are variants that were measured at one size only.
    """
    from matplotlib.figure import Figure  # a figure of its own: no window, no global state

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(16, 4 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), 4, squeeze=False)
    for line, model in zip(panels, models, strict=True):
        own = [row for row in rows if row["model"] == model and row["step_ms"] is not None]
        for axes, (against, label, fixed) in zip((line[:2], line[2:]), AXES, strict=True):
            _pair(axes, own, against, label, fixed, model)
    if panels[0][0].lines:
        panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _pair(axes: Any, rows: Sequence[Row], against: str, label: str, fixed: str, model: str) -> None:
    """Time on the left, memory on the right, where the other size has its most frequent (then its smallest) value."""
    if not rows:
        return
    sizes = [row[fixed] for row in rows]
    held = max(sorted(set(sizes)), key=sizes.count)
    curves = _curves([row for row in rows if row[fixed] == held], against)
    key, memory = memory_key(rows)
    for name, points in curves.items():
        values = [row[against] for row in points]
        style = {"marker": "o", "markersize": 4, "label": name, "linestyle": "--" if name == "floor" else "-"}
        axes[0].plot(values, [row["step_ms"] for row in points], **style)
        axes[1].plot(values, [row[key] / 1e6 for row in points], **style)
    for panel, quantity in zip(axes, ("ms a step", f"{memory}, MB"), strict=True):
        panel.set(xlabel=label, ylabel=quantity, title=f"{model}, {fixed.replace('_', ' ')} {held}")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)


def _curves(rows: Sequence[Row], against: str) -> dict[str, list[Row]]:
    """Method (or variant) → its rows, in the order of `against`; only those that were measured at more than one size."""
    curves: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row[against]):
        curves.setdefault(" ".join(filter(None, (row["method"], row.get("variant")))), []).append(row)
    several = {name: points for name, points in curves.items() if len(points) > 1}
    return several or {name: points for name, points in curves.items() if "variant" not in points[0]}


def memory_key(rows: Sequence[Row]) -> tuple[str, str]:
    """Which memory the rows have, and its name in words.

    Example:
        >>> memory_key([{"peak_bytes": None, "saved_bytes": 7}])
        ('saved_bytes', 'saved for backward')
    """
    if all(row["peak_bytes"] is not None for row in rows):
        return "peak_bytes", "peak memory"
    return "saved_bytes", "saved for backward"
