"""Line charts and scatter plots as SVG, in the colours of the page that they stand in.

series or dots ─→ Chart: ticks and places in pixels ─→ `chart` in page/parts.html
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

WIDTH, HEIGHT = 640, 260  # of the whole, in pixels
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 44  # margins
DECADES = 1.5  # a scale that spans more powers of ten is logarithmic

Point = tuple[float, float]
Scale = Callable[[float], float]


@dataclass(frozen=True)
class Series:
    """A line."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Axis:
    """A label, ticks as (place in pixels, text), and where a value lies in pixels."""

    label: str
    ticks: list[tuple[float, str]]
    place: Scale


@dataclass(frozen=True)
class Shape:
    """One series as it is drawn: its places, joined to a line or not."""

    name: str
    places: list[Point]
    joined: bool

    @property
    def path(self) -> str:
        """For SVG's polyline."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.places)


@dataclass(frozen=True)
class Chart:
    """What the template draws."""

    title: str
    x: Axis
    y: Axis
    shapes: list[Shape]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(title: str, x: str, y: str, series: Iterable[Series]) -> Chart | None:
    """A line for each series that has points; None where none has."""
    return _chart(title, x, y, [one for one in series if one.points], joined=True)


def dot_chart(title: str, x: str, y: str, dots: Iterable[tuple[str, float | None, float | None]]) -> Chart | None:
    """A dot for each (name, x, y) that has both; None where none has."""
    known = [Series(name, [(x, y)]) for name, x, y in dots if x is not None and y is not None]
    return _chart(title, x, y, known, joined=False)


def _chart(title: str, x: str, y: str, series: list[Series], joined: bool) -> Chart | None:
    points = [point for one in series for point in one.points]
    if not points:
        return None
    axis = _line_axis if joined else _dot_axis
    across = axis(x, [point[0] for point in points], LEFT, WIDTH - RIGHT)
    up = axis(y, [point[1] for point in points], HEIGHT - BOTTOM, TOP)
    shapes = [Shape(one.name, [(across.place(a), up.place(b)) for a, b in one.points], joined) for one in series]
    return Chart(title, across, up, shapes)


def _line_axis(label: str, values: Sequence[float], start: float, end: float) -> Axis:
    """From the lowest value at pixel `start` to the highest at `end`; steps and layers are whole numbers."""
    low, high = min(values), max(values)
    whole = all(value == int(value) for value in values)
    return _plain_axis(label, (low, high if high > low else low + 1), start, end, whole)


def _dot_axis(label: str, values: Sequence[float], start: float, end: float) -> Axis:
    """With room at both ends; logarithmic where the values span more than `DECADES`."""
    low, high = min(values), max(values)
    if low > 0 and math.log10(high / low) > DECADES:
        return _log_axis(label, low / 1.3, high * 1.3, start, end)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1
    return _plain_axis(label, (low - room, high + room), start, end, whole=False)


def _plain_axis(label: str, ends: Point, start: float, end: float, whole: bool) -> Axis:
    low, high = ends

    def place(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    ticks = [tick for tick in MaxNLocator(5, integer=whole).tick_values(low, high) if low <= tick <= high]
    return Axis(label, [(place(tick), number(tick)) for tick in ticks], place)


def _log_axis(label: str, low: float, high: float, start: float, end: float) -> Axis:
    def place(value: float) -> float:
        return start + math.log(value / low) / math.log(high / low) * (end - start)

    ticks = [tick for tick in LogLocator(numticks=6).tick_values(low, high) if low <= tick <= high]
    return Axis(f"{label} (logarithmic)", [(place(tick), number(tick)) for tick in ticks], place)


def number(value: float) -> str:
    """A number in a few letters.

    Example:
        >>> [number(value) for value in (0, 0.25, 1_250_000, 3e-5, 40)]
        ['0', '0.25', '1.25M', '3e-05', '40']
    """
    if abs(value) >= 1000:
        return EngFormatter(sep="").format_eng(float(f"{value:.4g}"))
    return f"{value:.4g}"
