"""Which channels an adapter changes in which layers, as small pictures that a page holds itself.

A row for each layer, a column for a few neighbouring channels; the denser, the larger the change. What does not change is
transparent, so that the pictures suit a light and a dark page.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from matplotlib.image import imsave

from s2ft.adapters.file import Adapter
from s2ft.adapters.inspection import ChannelMap, channel_maps

COLOUR = (0.63, 0.36, 0.85)  # red, green, blue
FAINTEST = 0.25  # of the smallest change, so that it shows at all


@dataclass(frozen=True)
class Picture:
    """A map of one projection."""

    title: str
    layers: int
    channels: int
    source: str  # a data: URI of a PNG file


def pictures(adapter: Adapter) -> list[Picture]:
    """One for each projection."""
    return [Picture(one.title, len(one.norms), one.channels, _as_uri(one)) for one in channel_maps(adapter)]


def _as_uri(drawn: ChannelMap) -> str:
    norms = np.nan_to_num(drawn.norms)
    share = norms / (norms.max() or 1)
    pixels = np.empty((*norms.shape, 4))
    pixels[..., :3] = COLOUR
    pixels[..., 3] = np.where(norms > 0, FAINTEST + (1 - FAINTEST) * share, 0)
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
