"""What an adapter changes, per module: counts, norms, and a picture of which channels in which layers.

layer   projection   side   channels   weights   ‖Δ‖   max |Δ|   which
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from s2ft.adapters.file import Adapter
from s2ft.common.extras import from_extra
from s2ft.layer.linears import layer_index, layer_stack

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABELS = 12  # most layers that are labelled in a panel of the picture


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


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """What one projection changes."""

    title: str
    channels: int  # up to the last that changes in any layer
    norms: NDArray[np.float64]  # [layers, bins]; NaN where a layer has no slice
    in_layers: bool  # False: a single row, for a module that is in no block


def changes(adapter: Adapter, base: nn.Module | None = None) -> list[ModuleChange]:
    """One row per module, in the order of the model's layers.

    Args:
        base: A model like the adapter's base (device meta will do); rows then say how the in-place layout holds each slice.

    Raises:
        S2FTError: if the adapter has slices of layers that the base does not have, or of other sizes.
    """
    held = {} if base is None else _placements(base, adapter)
    rows = [
        ModuleChange(
            module=path,
            layer=layer_index(path),
            side=trained.side,
            channels=len(trained.indices),
            weights=adapter.deltas[path].numel(),
            norm=float(adapter.deltas[path].double().norm()),
            largest=float(adapter.deltas[path].abs().max()),
            slice=str(trained),
            in_place=held.get(path),
        )
        for path, trained in adapter.slices.items()
    ]
    return sorted(rows, key=lambda row: -1 if row.layer is None else row.layer)


def _placements(base: nn.Module, adapter: Adapter) -> dict[str, str]:
    """Module → how the in-place layout holds its slice; raises `S2FTError` if the adapter is not for this base."""
    from s2ft.adapters.compatibility import check_fits  # here, since they import transformers and PEFT
    from s2ft.training.plan import planned

    check_fits(base, adapter.saved, {path: tuple(delta.shape) for path, delta in adapter.deltas.items()})
    return {place.module: place.how for place in planned(base, adapter.slices)}


def summary(adapter: Adapter, base: nn.Module | None = None) -> dict[str, Any]:
    """The adapter as a whole, and its rows, ready for JSON."""
    config, rows = adapter.saved, changes(adapter, base)
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


def draw(adapter: Adapter, png: Path, bins: int = 256) -> None:
    """One panel per projection: layers down, channels across, brightness is the norm of the change.

    Panels of one stack of blocks have the same rows, from its first block to the last that any of them changes; a block
    without a slice is grey.
    """
    picture(adapter, bins).savefig(png, dpi=120)


def picture(adapter: Adapter, bins: int = 256) -> Figure:
    """The figure that `draw` saves."""
    with from_extra("lab", "a picture of channels"):  # slow to import, and only pictures need it
        from matplotlib import colormaps
        from matplotlib.figure import Figure

    maps = channel_maps(adapter, bins)
    colours = colormaps["magma"].with_extremes(bad="0.85")
    figure = Figure(figsize=(10, 0.8 + 2.2 * len(maps)), layout="constrained")
    for axes, drawn in zip(figure.subplots(len(maps), squeeze=False)[:, 0], maps, strict=True):
        rows = len(drawn.norms)
        shape = (0, drawn.channels, rows, 0)
        image = axes.imshow(drawn.norms, aspect="auto", interpolation="nearest", extent=shape, cmap=colours)
        labelled = range(0, rows, -(-rows // _LABELS))
        names = [str(row) for row in labelled] if drawn.in_layers else [""]
        axes.set(title=drawn.title, ylabel="layer", yticks=[row + 0.5 for row in labelled], yticklabels=names)
        figure.colorbar(image, ax=axes, label="‖Δ‖")
    axes.set_xlabel("channel")
    return figure


def channel_maps(adapter: Adapter, bins: int = 256) -> list[ChannelMap]:
    """A map for each projection: how much each few neighbouring channels of each layer change."""
    maps = []
    for title, rows in _panels(adapter).items():
        width = max(int(adapter.slices[path].indices[-1]) for path in rows if path) + 1
        size = min(bins, width)
        norms = [_binned(adapter, path, width, size) if path else np.full(size, np.nan) for path in rows]
        in_layers = layer_index(next(filter(None, rows))) is not None
        maps.append(ChannelMap(title, width, np.stack(norms), in_layers))
    return maps


def _panels(adapter: Adapter) -> dict[str, list[str | None]]:
    """Title → the module of each row, None where a block has no slice; a row of its own for what is in no block."""
    stacks: dict[str, int] = {}
    for stack, layer in filter(None, map(layer_stack, adapter.slices)):
        stacks[stack] = max(stacks.get(stack, 0), layer + 1)
    panels: dict[str, list[str | None]] = {}
    for path in adapter.slices:
        place = layer_stack(path)
        if place is None:
            panels[path] = [path]
            continue
        stack, layer = place
        inside = path.removeprefix(f"{stack}.{layer}.".lstrip("."))
        title = inside if len(stacks) == 1 and inside.count(".") < 2 else f"{stack}.*.{inside}"
        panels.setdefault(title, [None] * stacks[stack])[layer] = path
    return panels


def _binned(adapter: Adapter, path: str, width: int, bins: int) -> NDArray[np.float64]:  # [bins]
    trained = adapter.slices[path]
    squares = adapter.deltas[path].double().square().sum(1 - trained.dim).numpy()
    return np.sqrt(np.bincount(trained.indices * bins // width, weights=squares, minlength=bins))
