"""Several runs beside each other: their figures, which of these says how good a run is, and a page.

quality     mean score of the tasks, if all runs were asked and answered the same; else held-out loss; else training loss
pictures    quality against trained parameters, time and memory
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from s2ft.common.errors import S2FTError, raise_together
from s2ft.common.reading import read_json
from s2ft.report.charts import Series, dot_chart, line_chart
from s2ft.report.pages import render

Cards = Mapping[str, Mapping[str, Any]]  # name of the run → its card
Row = dict[str, Any]

COSTS = {  # figure of a row → its axis
    "parameters": "trained parameters",
    "seconds": "time in seconds",
    "memory_bytes": "memory at most, in bytes",
}
ALIKE = {  # what should not differ → where a card has it
    "base": ("options", "model"),
    "data": ("data", "digest"),
    "objective": ("options", "objective"),
    "status": ("status",),
    "number of examples held out": ("training", "held_out"),
    "GPU": ("environment", "gpu"),
    "processor": ("environment", "cpu"),
}


_NAMES = {
    "learning_rate": "rate",
    "held_out_loss": "held out",
    "tokens_per_second": "tokens/s",
    "memory_bytes": "memory",
}


class Quality(NamedTuple):
    """What the pictures show as quality."""

    name: str
    values: dict[str, float | None]  # of each run


def read_runs(folders: Sequence[Path]) -> Cards:
    """The cards of these folders, by the folders' names, or by their paths where names meet.

    Raises:
        S2FTError: for folders that hold no run of `s2ft train`, or are named twice.
    """
    raise_together(
        f"runs: {str(folder)!r} holds no run.json, so it is no run of s2ft train"
        for folder in folders
        if not (folder / "run.json").is_file()
    )
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    cards = {name: read_json(folder / "run.json") for name, folder in zip(names, folders, strict=True)}
    raise_together(
        f"runs: {name!r} is no run card: it has no section training" for name in cards if not _is_card(cards[name])
    )
    if len(cards) < len(folders):
        raise S2FTError(f"runs: {', '.join(sorted({name for name in names if names.count(name) > 1}))} is named twice")
    return cards


def _is_card(card: Mapping[str, Any]) -> bool:
    return isinstance(card.get("training"), Mapping)


def rows(cards: Cards) -> list[Row]:
    """One for each run, all with the same figures; None where a run has none."""
    tasks = list(dict.fromkeys(task for card in cards.values() for task in card.get("scores", {})))
    return [{"run": name, **_figures(card), **_scores(card, tasks)} for name, card in cards.items()]


def _figures(card: Mapping[str, Any]) -> Row:
    training, result = card["training"], card.get("adapter") or card.get("model") or {}
    return {
        "method": training.get("method"),
        "parameters": result.get("trainable_parameters"),
        "share": result.get("share"),
        "learning_rate": training.get("learning_rate"),
        "held_out_loss": training.get("best_loss"),
        "loss": training.get("final_loss"),
        "seconds": training.get("seconds"),
        "tokens_per_second": training.get("tokens_per_second"),
        "memory_bytes": training.get("peak_memory_bytes"),
    }


def _scores(card: Mapping[str, Any], tasks: list[str]) -> Row:
    return {task: card.get("scores", {}).get(task, {}).get("tuned") for task in tasks}


def shown(row: Row) -> Row:
    """A row as tables show it; None where there is no figure.

    Example:
        >>> shown({"run": "a", "method": "lora", "parameters": 63168, "share": 0.0389, "loss": 0.5, "memory_bytes": 6.1e8})
        {'run': 'a', 'method': 'lora', 'parameters': '63,168', 'share': '3.89%', 'loss': '0.5', 'memory': '0.61 GB'}
    """
    forms = {"parameters": "{:,}", "share": "{:.2%}", "seconds": "{:,.0f}", "tokens_per_second": "{:,.0f}"}
    found = {}
    for name, value in row.items():
        in_words = value is None or isinstance(value, str)
        value = value / 1e9 if name == "memory_bytes" and value is not None else value
        form = "{:.2f} GB" if name == "memory_bytes" else forms.get(name, "{:.4g}")
        found[_NAMES.get(name, name)] = value if in_words else form.format(value)
    return found


def quality(cards: Cards) -> Quality:
    """The best measure that all runs have."""
    table = {row["run"]: row for row in rows(cards)}
    asked = [_questions(card) for card in cards.values()]
    tasks = asked[0].keys()
    if (
        tasks
        and asked == [asked[0]] * len(asked)
        and None not in asked[0].values()  # what has no questions need be no share of right answers
        and all(row[task] is not None for row in table.values() for task in tasks)
    ):
        return Quality("mean score", {name: fmean(row[task] for task in tasks) for name, row in table.items()})
    held_out = {name: row["held_out_loss"] for name, row in table.items()}
    if None not in held_out.values():
        return Quality("held-out loss", held_out)
    return Quality("training loss", {name: row["loss"] for name, row in table.items()})


def _questions(card: Mapping[str, Any]) -> dict[str, tuple[int, int] | None]:
    """Task → how many questions of it were asked, and how many found no answer; None where that is not noted."""
    scores: Mapping[str, Mapping[str, Any]] = card.get("scores", {})
    return {
        task: (score["questions"], score.get("errors", 0)) if "questions" in score else None
        for task, score in scores.items()
    }


def differences(cards: Cards) -> list[str]:
    """What keeps the runs from being compared, in words."""
    first, *others = cards
    found = []
    all_values = {
        what: {name: reduce(lambda part, key: part.get(key, {}), place, card) for name, card in cards.items()}
        for what, place in ALIKE.items()
    }
    all_values["questions or in how many they answered"] = {name: _questions(card) for name, card in cards.items()}
    for what, values in all_values.items():
        odd = [name for name in others if values[name] != values[first]]
        if odd:
            found.append(f"{', '.join(odd)} and {first} differ in their {what}")
    return found


def runs_page(cards: Cards) -> str:
    """The page, as HTML."""
    table, measure = rows(cards), quality(cards)
    dots = {name: [(row["run"], row[name], measure.values[row["run"]]) for row in table] for name in COSTS}
    charts = [dot_chart(f"Against {label}", label, measure.name, dots[name]) for name, label in COSTS.items()]
    for title, curve in (("Held-out loss", "held_out_curve"), ("Training loss", "loss_curve")):
        lines = [Series(name, card.get(curve, [])) for name, card in cards.items()]
        charts.append(line_chart(title, "optimizer step", "loss", lines))
    return render(
        "runs.html",
        rows=[shown(row) for row in table],
        cards=cards,
        charts=[chart for chart in charts if chart is not None],
        measure=measure.name,
        differences=differences(cards),
    )
