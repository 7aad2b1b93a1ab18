"""Where adapters meet, before they are fused: per module and pair, the shared channels and what happens on them.

    shared           channels that both train; the others are added exactly, whatever the method
    cosine           of the two deltas on the shared channels: 1 pulls the same way, -1 against each other
    sign conflict    share of the shared entries whose signs differ: what TIES resolves
    interference     ‖what the other adds to my channels‖ / ‖my whole delta‖ in this module, by the given weights.
                     For inputs that are white this is the relative error, root mean square, of my delta's output
                     that comes from shared channels (E‖Δx‖² = ‖Δ‖²).

Disjoint channels do not interfere in the weights; their effects on the output still add up, as those of any two changes do.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from s2ft.common.extras import from_extra
from s2ft.format.names import name_in_layer
from s2ft.format.slices import Indices, Slice
from s2ft.layer.linears import layer_index

if TYPE_CHECKING:
    from s2ft.adapters.fusion import Fusion


@dataclass(frozen=True)
class Overlap:
    """Two adapters on one module. Adapters are numbered from 0, in the order given."""

    module: str
    layer: int | None
    side: str
    first: int
    second: int
    first_channels: int
    second_channels: int
    shared: int
    share: float  # of the channels that either holds
    cosine: float | None  # None without shared channels, or where a delta is zero on them
    sign_conflict: float | None
    interference_on_first: float | None  # None where the adapter's own weighted delta is zero
    interference_on_second: float | None


def overlaps(fusion: Fusion) -> list[Overlap]:
    """One row for each module and each pair of adapters that change it, in the order of the model's layers."""
    rows = [_overlap(fusion, module, *pair) for module in fusion.slices for pair in _pairs(fusion, module)]
    return sorted(rows, key=lambda row: -1 if row.layer is None else row.layer)


def summary(fusion: Fusion) -> dict[str, Any]:
    """The fusion as a whole, and its rows, ready for JSON."""
    rows = fusion.overlaps
    return {
        "adapters": [source.name for source in fusion.sources],
        "weights": list(fusion.weights),
        "method": fusion.method,
        "density": fusion.density,
        "seed": fusion.seed,
        "modules": len(fusion.slices),
        "channels": sum(len(trained.indices) for trained in fusion.slices.values()),
        "shared": sum(row.shared for row in rows),
        "rows": [asdict(row) for row in rows],
    }


def draw(rows: list[Overlap], png: Path) -> None:
    """Two heat maps, layers down and projections across: share of shared channels, and the larger interference."""
    with from_extra("lab", "a picture of overlaps"):  # slow to import, and only pictures need it
        from matplotlib.figure import Figure

    layers = sorted({row.layer for row in rows}, key=lambda layer: -1 if layer is None else layer)
    names = list(dict.fromkeys(name_in_layer(row.module) for row in rows))
    share, interference = np.full((2, len(layers), len(names)), np.nan)
    for row in rows:
        cell = layers.index(row.layer), names.index(name_in_layer(row.module))
        share[cell] = np.fmax(share[cell], row.share)
        both = [value for value in (row.interference_on_first, row.interference_on_second) if value is not None]
        interference[cell] = np.fmax(interference[cell], max(both, default=np.nan))
    figure = Figure(figsize=(3 + 2.4 * len(names), 1.6 + 0.28 * len(layers)), layout="constrained")
    maps = (("share of shared channels", share, 1.0), ("interference", interference, None))
    for axes, (title, values, highest) in zip(figure.subplots(1, 2), maps, strict=True):
        image = axes.imshow(values, aspect="auto", cmap="magma", vmin=0, vmax=highest)
        axes.set(title=title, ylabel="layer", yticks=range(len(layers)), yticklabels=layers)
        axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
        figure.colorbar(image, ax=axes)
    figure.savefig(png, dpi=120)


def _pairs(fusion: Fusion, module: str) -> list[tuple[int, int]]:
    holders = [number for number, source in enumerate(fusion.sources) if module in source.slices]
    return list(combinations(holders, 2))


def _overlap(fusion: Fusion, module: str, first: int, second: int) -> Overlap:
    slices = [fusion.sources[number].slices[module] for number in (first, second)]
    counts = [len(trained.indices) for trained in slices]
    common = np.intersect1d(slices[0].indices, slices[1].indices, assume_unique=True)
    meeting = (None, None, 0.0, 0.0) if not len(common) else _meeting(fusion, module, (first, second), common)
    cosine, sign_conflict, on_first, on_second = meeting
    return Overlap(
        module=module,
        layer=layer_index(module),
        side=slices[0].side,
        first=first,
        second=second,
        first_channels=counts[0],
        second_channels=counts[1],
        shared=len(common),
        share=len(common) / (sum(counts) - len(common)),
        cosine=cosine,
        sign_conflict=sign_conflict,
        interference_on_first=on_first,
        interference_on_second=on_second,
    )


def _meeting(
    fusion: Fusion, module: str, numbers: tuple[int, int], common: Indices
) -> tuple[float | None, float | None, float | None, float | None]:
    """Cosine, sign conflict, interference on the first and on the second."""
    weights = [abs(fusion.weights[number]) for number in numbers]
    sources = [fusion.sources[number] for number in numbers]
    deltas = [source.delta(module).cpu() for source in sources]
    a, b = (_at(delta, source.slices[module], common).double() for delta, source in zip(deltas, sources, strict=True))
    return (
        _ratio(float((a * b).sum()), float(a.norm() * b.norm())),
        float((a.sign() * b.sign() < 0).float().mean()),
        _ratio(weights[1] * float(b.norm()), weights[0] * _norm(deltas[0])),
        _ratio(weights[0] * float(a.norm()), weights[1] * _norm(deltas[1])),
    )


def _ratio(part: float, whole: float) -> float | None:
    ratio = part / whole if whole else math.nan
    return ratio if math.isfinite(ratio) else None


def _norm(delta: Tensor) -> float:
    return float(torch.linalg.vector_norm(delta, dtype=torch.promote_types(delta.dtype, torch.float32)))


def _at(delta: Tensor, trained: Slice, channels: Indices) -> Tensor:
    """The delta's values on some of its channels."""
    return delta.index_select(trained.dim, torch.from_numpy(np.searchsorted(trained.indices, channels)))
