"""The run card: what was run, on what, and what came out, as `run.json`, `run.md` and `loss.png` beside the adapter.

A card is a mapping of sections, each a mapping of names to values. To add measurements, add a section and write the card again:
`write_card(folder, {**read_card(folder), "scores": {...}})`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2ft.common.files import staged
from s2ft.common.reading import read_json

Card = dict[str, Any]
_TAIL = 0.1  # the part of the loss curve that the final loss is the mean of


def final_mean(curve: Sequence[tuple[int, float]]) -> float | None:
    """The mean over the last tenth of the points; None without any.

    Example:
        >>> final_mean([(5, 3.0), (10, 2.0), (15, 1.0)])
        1.0
    """
    tail = curve[-max(1, round(_TAIL * len(curve))) :]
    return sum(loss for _, loss in tail) / len(tail) if tail else None


def read_card(folder: str | Path) -> Card:
    """The card in `folder`."""
    return read_json(Path(folder) / "run.json")


def write_card(folder: str | Path, card: Card) -> None:
    """Writes `run.json`, `run.md` and, where there is a loss curve, `loss.png`; each whole or not at all."""
    curve = card.get("loss_curve") or []
    with staged(Path(folder)) as aside:
        (aside / "run.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (aside / "run.md").write_text(to_markdown(card), encoding="utf-8")
        if curve:
            _draw(curve, aside / "loss.png", "loss" if "objective" in card else "loss per response token")


def to_markdown(card: Mapping[str, Any]) -> str:
    """A heading and a table for each section.

    Example:
        >>> print(to_markdown({"status": "finished", "training": {"steps": 12}}))
        # Run card
        <BLANKLINE>
        Status: finished
        <BLANKLINE>
        ## Training
        <BLANKLINE>
        | | |
        |---|---|
        | steps | 12 |
        <BLANKLINE>
    """
    lines = ["# Run card", "", f"Status: {card.get('status')}", ""]
    for name, section in card.items():
        if isinstance(section, Mapping):
            lines += [f"## {name.replace('_', ' ').capitalize()}", "", *_table(section), ""]
    if card.get("loss_curve"):
        lines += ["![loss](loss.png)", ""]
    return "\n".join(lines)


def _table(section: Mapping[str, Any]) -> list[str]:
    """A row for each entry; entries that are mappings themselves, such as the scores of tasks, share a heading."""
    if section and all(isinstance(value, Mapping) for value in section.values()):
        names = list(dict.fromkeys(name for value in section.values() for name in value))
        rows = [[key, *(value.get(name) for name in names)] for key, value in section.items()]
        heading = ["", *(name.replace("_", " ") for name in names)]
    else:
        heading, rows = ["", ""], [[key, value] for key, value in section.items()]
    return [_line(heading), "|" + "---|" * len(heading), *(_line(row) for row in rows)]


def _line(cells: Sequence[Any]) -> str:
    return "|" + "|".join(f" {text} " if (text := _cell(cell)) else " " for cell in cells) + "|"


def _cell(value: Any) -> str:
    return _text(value).replace("|", "\\|").replace("\n", " ")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)


def _draw(curve: Sequence[tuple[int, float]], path: Path, unit: str) -> None:
    from matplotlib.figure import Figure  # a figure of its own: no window, no global state

    steps, losses = zip(*curve, strict=True)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, marker="o" if len(curve) < 20 else None, markersize=3)
    axes.set(xlabel="optimizer step", ylabel=unit, title="Training loss")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
