"""Where a chart puts its points and ticks, against plain arithmetic."""

import math
import random

import pytest

from s2ft.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, dot_chart, line_chart


def test_a_line_goes_from_corner_to_corner() -> None:
    points = sorted((random.uniform(0, 900), random.uniform(-3, 3)) for _ in range(30))
    lows, highs = ([pick(values) for values in zip(*points, strict=True)] for pick in (min, max))
    chart = line_chart("t", "x", "y", [Series("a", points), Series("empty", [])])
    assert chart is not None
    (shape,) = chart.shapes
    for (x, y), (across, up) in zip(points, shape.places, strict=True):
        assert across == pytest.approx(LEFT + (x - lows[0]) / (highs[0] - lows[0]) * (WIDTH - RIGHT - LEFT))
        assert up == pytest.approx(HEIGHT - BOTTOM - (y - lows[1]) / (highs[1] - lows[1]) * (HEIGHT - BOTTOM - TOP))
    for place, text in chart.y.ticks:
        assert chart.y.place(float(text)) == pytest.approx(place, abs=0.5)
    assert len(chart.y.ticks) >= 3


def test_steps_and_layers_have_whole_ticks() -> None:
    chart = line_chart("t", "layer", "y", [Series("a", [(0, 0.5), (1, 0.7), (2, 0.6), (3, 0.1)])])
    assert chart is not None
    assert [text for _, text in chart.x.ticks] == ["0", "1", "2", "3"]


def test_dots_far_apart_lie_on_a_logarithmic_scale() -> None:
    chart = dot_chart("t", "parameters", "loss", [("a", 1e4, 2.0), ("b", 1e6, 1.0), ("c", 1e5, None)])
    assert chart is not None
    (ax, ay), (bx, by) = (shape.places[0] for shape in chart.shapes)
    assert [shape.name for shape in chart.shapes] == ["a", "b"]
    assert LEFT < ax < bx < WIDTH - RIGHT
    assert TOP < ay < by < HEIGHT - BOTTOM  # pixels count downwards
    assert chart.x.place(math.sqrt(1e4 * 1e6)) == pytest.approx((ax + bx) / 2)
    assert "logarithmic" in chart.x.label
    assert "logarithmic" not in chart.y.label


@pytest.mark.parametrize("points", [[], [(5.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)]])
def test_few_or_equal_points_have_a_place_or_no_chart(points) -> None:
    chart = line_chart("t", "x", "y", [Series("a", points)])
    assert (chart is None) == (not points)
    assert chart is None or all(math.isfinite(value) for place in chart.shapes[0].places for value in place)
