"""The recipes as a table: the paper's figure, and what a run needs.

    recipe | paper | learning rate | GB at 4 examples of 512 and of 2,048 tokens | hours on one A100

Memory is computed (`memory.py`), hours are estimated (`duration.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from s2ft.finetune.methods import METHODS
from s2ft.lab.reproduce.duration import hours
from s2ft.lab.reproduce.memory import Memory, parameters, training_memory
from s2ft.lab.reproduce.recipes import MODELS, Recipe, recipes

BATCH, LENGTHS = 4, (512, 2048)  # examples at once, `s2ft train`'s default; tokens of each: long ones, and the longest


def recipe_rows(tell: Callable[[float], Any] = lambda done: None) -> list[dict[str, Any]]:
    """A row for each recipe; `tell` hears the share that is done."""
    rows: list[dict[str, Any]] = []
    memory: dict[tuple[str, str], Memory] = {}  # a method has one size on a model, whatever it learns
    for recipe in recipes().values():
        kind = recipe.model, recipe.method
        if recipe.is_trained and kind not in memory:
            memory[kind] = training_memory(recipe)
        rows.append(_row(recipe, memory.get(kind)))
        tell(len(rows) / len(recipes()))
    return rows


def recipe_line(row: dict[str, Any]) -> dict[str, str]:
    """A row for people."""
    memory = row["memory"]
    needs = {
        f"GB, {BATCH} × {length}": "–" if memory is None else f"{Memory(**memory).total(BATCH * length) / 1e9:.0f}"
        for length in LENGTHS
    }
    forms = {"learning_rate": ".3g", "hours": ".1f"}  # hours are an estimate
    rate, time = ("–" if row[name] is None else format(row[name], form) for name, form in forms.items())
    return {"recipe": row["recipe"], "paper": f"{row['paper']:g}", "rate": rate, **needs, "hours": time}


def _row(recipe: Recipe, memory: Memory | None) -> dict[str, Any]:
    row = {"recipe": recipe.name, "paper": recipe.paper}
    if memory is None:
        return {**row, "learning_rate": None, "memory": None, "hours": None}
    size = parameters(MODELS[recipe.model].shape)
    rate = recipe.options.get("learning_rate", METHODS[recipe.method].learning_rate)
    return {**row, "learning_rate": rate, "memory": vars(memory), "hours": hours(recipe, size)}
