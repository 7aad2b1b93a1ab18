"""The page of one run: its curves, scores, channels, deltas, samples and command, from its card and its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from s2ft.adapters.file import Adapter, read_adapter
from s2ft.format.config_file import method_of
from s2ft.format.names import name_in_layer
from s2ft.format.terms import METHOD
from s2ft.report.charts import Chart, Series, line_chart
from s2ft.report.maps import pictures
from s2ft.report.pages import render

Card = Mapping[str, Any]


def run_page(card: Card, folder: Path) -> str:
    """The page, as HTML.

    Args:
        card: The run card.
        folder: With the adapter, whose channels are drawn if it is one of S²FT.
    """
    adapter = _adapter(folder)
    sections = {name: section for name, section in card.items() if isinstance(section, Mapping) and name != "scores"}
    return render(
        "run.html",
        card=card,
        result=card.get("adapter") or card.get("model") or {},
        training=card.get("training", {}),
        charts=_charts(card),
        maps=[] if adapter is None else pictures(adapter),
        samples=card.get("samples", []),
        answers=card.get("answers", []),
        sections=sections,
    )


def _adapter(folder: Path) -> Adapter | None:
    """The adapter in the folder; None if there is none of S²FT."""
    ours = (folder / CONFIG_NAME).is_file() and method_of(folder) == METHOD
    return read_adapter(folder) if ours else None


def _charts(card: Card) -> list[Chart]:
    losses = [Series("training", card.get("loss_curve", [])), Series("held out", card.get("held_out_curve", []))]
    rates = [Series("learning rate", card.get("rate_curve", []))]
    charts = (
        line_chart("Loss", "optimizer step", "loss", losses),
        line_chart("Learning rate", "optimizer step", "learning rate", rates),
        line_chart("Change of each layer", "layer", "‖Δ‖ / ‖W‖", _by_layer(card)),
    )
    return [chart for chart in charts if chart is not None]


def _by_layer(card: Card) -> list[Series]:
    """How much each layer changes, against what it held: a line for each projection."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in card.get("layers", []):
        if row["layer"] is not None and row["base"]:
            name = name_in_layer(row["module"])
            lines.setdefault(name, []).append((row["layer"], row["delta"] / row["base"]))
    return [Series(name, points) for name, points in lines.items()]
