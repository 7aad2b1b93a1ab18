"""How long does a recipe train? Estimated from the steps that the S²FT paper timed on one A100 with 80 GB (its figure 5).

    time = tokens · slope + optimizer steps · constant,    both in proportion to the model's parameters

The figure has LLaMA-7B at 512 tokens with one and two examples: their difference is the slope, the rest is what an optimizer
step costs besides. Read off a figure; loading, evaluation and padding come on top.
"""

from __future__ import annotations

from s2ft.lab.reproduce.recipes import GLOBAL_BATCH, Recipe

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
    return ms * parameters / TIMED_PARAMETERS / 3.6e6
