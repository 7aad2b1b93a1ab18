"""What an adapter changes, per module: counts, norms, and a picture of which channels in which layers.

layer   projection   side   channels   weights   ‖Δ‖   max |Δ|   which
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from torch import nn

from s2ft.adapter.file import Adapter
from s2ft.method.in_place import planned
from s2ft.method.structure import layer_index

_WHICH = 12  # characters of the list of channels that a row shows; JSON has them all


@dataclass(frozen=True)
class ModuleChange:
    """One module's row."""

    module: str
    layer: int | None
    side: str
    channels: int
    weights: int
    norm: float  # Frobenius
    largest: float  # in absolute value
    slice: str
    in_place: str | None = None  # how the in-place layout holds it, where the base is known


def changes(adapter: Adapter, base: nn.Module | None = None) -> list[ModuleChange]:
    """One row per module, in the order of the model's layers.

    Args:
        base: A model like the adapter's base (values are not needed): rows then say how the in-place layout holds each slice.
    """
    held = {} if base is None else {place.module: place.how for place in planned(base, adapter.slices)}
    rows = [
        ModuleChange(
            module=path,
            layer=layer_index(path),
            side=chosen.side,
            channels=len(chosen.indices),
            weights=adapter.deltas[path].numel(),
            norm=float(adapter.deltas[path].double().norm()),
            largest=float(adapter.deltas[path].abs().max()),
            slice=str(chosen),
            in_place=held.get(path),
        )
        for path, chosen in adapter.slices.items()
    ]
    return sorted(rows, key=lambda row: -1 if row.layer is None else row.layer)


def summary(adapter: Adapter, base: nn.Module | None = None) -> dict[str, Any]:
    """The adapter as a whole, and its rows, ready for JSON."""
    config, rows = adapter.config, changes(adapter, base)
    return {
        "adapter": str(adapter.folder),
        "base_model": config.base_model_name_or_path,
        "strategy": config.strategy,
        "subset": config.subset,
        "seed": config.seed,
        "modules": len(rows),
        "weights": adapter.parameters,
        "norm": math.sqrt(sum(row.norm**2 for row in rows)),
        "file_bytes": adapter.file_bytes,
        "kept_whole": sorted(adapter.others),
        "rows": [asdict(row) for row in rows],
    }


def table(adapter: Adapter, base: nn.Module | None = None) -> Table:
    """The rows for people; a blank layer repeats the one above."""
    result = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("layer", "module", "side"):
        result.add_column(name, no_wrap=True)
    for name in ("channels", "weights", "‖Δ‖", "max |Δ|"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("which")
    if base is not None:
        result.add_column("in place", no_wrap=True)
    above: int | None = None
    for row in changes(adapter, base):
        layer = "" if row.layer is None or row.layer == above else str(row.layer)
        above = row.layer
        name = ".".join(row.module.split(".")[-2:])
        numbers = (str(row.channels), f"{row.weights:,}", f"{row.norm:.4g}", f"{row.largest:.3g}")
        which = row.slice.partition(" ")[2]
        which = which if len(which) <= _WHICH else which[: _WHICH - 1] + "…"
        result.add_row(layer, name, row.side, *numbers, which, *([row.in_place] if base is not None else []))
    return result


def draw(adapter: Adapter, png: Path, bins: int = 256) -> None:
    """One panel per projection: layers down, channels across, brightness is the norm of the change."""
    from matplotlib.figure import Figure  # deferred: slow to import, and only pictures need it

    panels: dict[str, list[str]] = {}
    for path in adapter.slices:
        panels.setdefault(".".join(path.split(".")[-2:]), []).append(path)
    figure = Figure(figsize=(10, 0.8 + 2.2 * len(panels)), layout="constrained")
    for axes, (name, paths) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        width = max(int(adapter.slices[path].indices[-1]) for path in paths) + 1
        rows = np.stack([_binned(adapter, path, width, min(bins, width)) for path in paths])
        image = axes.imshow(
            rows, aspect="auto", interpolation="nearest", extent=(0, width, len(paths), 0), cmap="magma"
        )
        axes.set(
            title=name,
            ylabel="layer",
            yticks=np.arange(len(paths)) + 0.5,
            yticklabels=[layer_index(path) for path in paths],
        )
        figure.colorbar(image, ax=axes, label="‖Δ‖")
    axes.set_xlabel("channel")
    figure.savefig(png, dpi=120)


def _binned(adapter: Adapter, path: str, width: int, bins: int) -> NDArray[np.float64]:  # [bins]
    chosen = adapter.slices[path]
    squares = adapter.deltas[path].double().square().sum(0 if chosen.side == "in" else 1).numpy()
    return np.sqrt(np.bincount(chosen.indices * bins // width, weights=squares, minlength=bins))
