"""Recipes: rows of the S²FT paper's tables, each with the options of its run and the figure that the paper reports.

    SUITE / MODEL / METHOD        arithmetic/llama2-7b/s2ft  →  options of `s2ft train`, suite of `s2ft eval`, 72.0

A YAML file for each table holds what its rows share, once; a recipe is put together from it. Here are the
paper's rows on LLaMA2-7B, LLaMA3-8B and Mistral-7B. Source: arXiv 2412.06289.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from s2ft.common.errors import S2FTError
from s2ft.evaluate.tasks import SUITES
from s2ft.lab.shapes import LLAMA2_7B, LLAMA3_8B, MISTRAL_7B

VANILLA = "vanilla"  # the base model, as it is
GLOBAL_BATCH = 64  # examples of an optimizer step, on all GPUs together


@dataclass(frozen=True)
class BaseModel:
    """A base model of the paper: its name on the Hub, and its shape (arguments of LlamaConfig)."""

    hub: str
    shape: dict[str, int]


MODELS = {
    "llama2-7b": BaseModel("meta-llama/Llama-2-7b-hf", LLAMA2_7B),
    "llama3-8b": BaseModel("meta-llama/Meta-Llama-3-8B", LLAMA3_8B),
    "mistral-7b": BaseModel("mistralai/Mistral-7B-v0.1", MISTRAL_7B),
}


@dataclass(frozen=True)
class Recipe:
    """One row of a table."""

    suite: str
    model: str  # a key of `MODELS`
    method: str  # of `s2ft train`, or "vanilla"
    options: dict[str, Any]  # of `s2ft train`: those in which the row differs from its defaults
    training_data: str  # a file in the data folder, or a name on the Hub
    examples: int  # of the training data
    tokens_per_example: float  # an estimate
    paper: float  # average accuracy in percent, or rating from 1 to 10

    @property
    def name(self) -> str:
        """As in `s2ft reproduce NAME`."""
        return f"{self.suite}/{self.model}/{self.method}"

    @property
    def is_trained(self) -> bool:
        """Whether there is anything to train."""
        return self.method != VANILLA


@cache
def recipes() -> dict[str, Recipe]:
    """Every recipe, by name.

    Example:
        >>> recipe = recipes()["arithmetic/llama2-7b/s2ft"]
        >>> recipe.paper, recipe.options["learning_rate"], recipe.options["ratios"]
        (72.0, 0.001, {'o_proj': 0.052, 'down_proj': 0.02})
    """
    return {recipe.name: recipe for table in _tables() for recipe in _rows(table)}


def find_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        S2FTError: if there is none, with the nearest names.
    """
    known = recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "`s2ft reproduce --list` shows them all"
        raise S2FTError(f"recipe={name!r} is unknown; {hint}")
    return known[name]


def _tables() -> Iterator[dict[str, Any]]:
    """Those of the suites that the paper reports: `SUITE.yaml` beside this file."""
    for suite in SUITES:
        file = files(__package__).joinpath(f"{suite}.yaml")
        if file.is_file():
            yield yaml.safe_load(file.read_text(encoding="utf-8"))


def _rows(table: dict[str, Any]) -> Iterator[Recipe]:
    facts = {name: table[name] for name in ("suite", "training_data", "examples", "tokens_per_example")}
    for model, figures in table["paper"].items():
        for method, figure in figures.items():
            own = {"ratios": table["ratios"][model]} if method == "s2ft" else {}
            options = {"method": method, **table["options"], **table["methods"][method], **own}
            yield Recipe(model=model, method=method, options=options, paper=figure, **facts)
