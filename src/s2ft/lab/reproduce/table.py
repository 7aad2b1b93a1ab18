"""The recipes as a table: the paper's figure, and what a run needs.

    recipe | paper | learning rate | GB at 4 examples of 512 and of 2,048 tokens | hours on one A100

Memory is computed (`memory.py`). Hours of training are estimated from the steps that the S²FT paper timed on one A100 with
80 GB (its figure 5):

    time = tokens · slope + optimizer steps · constant,    both in proportion to the model's parameters

The figure has LLaMA-7B at 512 tokens with one and two examples: their difference is the slope, the rest is what an optimizer
step costs besides. Read off a figure; loading, evaluation and padding come on top.
"""

from __future__ import annotations

from typing import Any

from s2ft.finetune.methods import METHODS
from s2ft.lab.registry import TellShare
from s2ft.lab.reproduce.memory import Memory, parameters, training_memory
from s2ft.lab.reproduce.recipes import GLOBAL_BATCH, MODELS, Recipe, recipes

BATCH, LENGTHS = 4, (512, 2048)  # examples at once, `s2ft train`'s default; tokens of each: long ones, and the longest


def recipe_rows(tell: TellShare = lambda done: None) -> list[dict[str, Any]]:
    """A row for each recipe; `tell` is told the share that is done."""
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


TIMED_TOKENS = 512
TIMED_PARAMETERS = 6.74e9
STEP_MS = {  # method → one and two examples
    "s2ft": (118, 231),
    "lora": (138, 260),
    "dora": (234, 398),
    "lisa": (135, 250),
    "galore": (610, 717),
    "full": (314, 439),
}


def hours(recipe: Recipe, parameters: float) -> float:
    """Estimated hours of training on one A100; 0 where nothing is trained.

    Args:
        parameters: Of the base model.

    Example:
        >>> from s2ft.lab.reproduce.recipes import recipes
        >>> round(hours(recipes()["arithmetic/llama2-7b/s2ft"], 6.74e9), 2)
        0.29
    """
    if not recipe.is_trained:
        return 0.0
    one, two = STEP_MS[recipe.method]
    examples = recipe.options["epochs"] * recipe.examples
    tokens = examples * recipe.tokens_per_example
    ms = tokens / TIMED_TOKENS * (two - one) + examples / GLOBAL_BATCH * (2 * one - two)
    return float(ms * parameters / TIMED_PARAMETERS / 3.6e6)
