"""The quickstart: teach the embedded base model a skill it lacks, and see what that does to the skills it has.

base scores  →  train on the new skill  →  tuned scores, side by side
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from s2ft.demo import base_path
from s2ft.demo.evaluate import Score, exact_match
from s2ft.demo.skills import NEW_SKILLS, OLD_SKILLS, SKILLS, Example
from s2ft.finetune.card import Card, read_card, write_card
from s2ft.finetune.options import TrainOptions
from s2ft.finetune.train import train
from s2ft.runtime.models import load_model, load_tokenizer
from s2ft.runtime.precision import choose_precision

NEW_SKILL = NEW_SKILLS[0]
SKILL_NAMES = (NEW_SKILL, *OLD_SKILLS)
TRAINING: dict[str, Any] = {
    "ratios": {"o_proj": 1 / 6, "down_proj": 0.1},  # a small model needs a larger share than a large one
    "learning_rate": 2e-3,
    "batch_size": 32,
    "gradient_accumulation": 1,
    "epochs": 8,
    "seed": 0,
    "layout": "in-place",  # the same in every run, so that scores repeat
}


@dataclass(frozen=True)
class Comparison:
    """Base against tuned, on the test examples of each skill."""

    folder: Path  # of the adapter
    card: Card
    examples: dict[str, list[Example]]
    base: dict[str, Score]
    tuned: dict[str, Score]
    base_bytes: int

    @property
    def accuracies(self) -> dict[str, dict[str, float]]:
        """Skill → base and tuned, for the run card."""
        return {name: {"base": self.base[name].accuracy, "tuned": self.tuned[name].accuracy} for name in self.base}


def quickstart(folder: Path, train_examples: int = 1000, test_examples: int = 100) -> Comparison:
    """Trains in `folder` and leaves the adapter, its card and the data there."""
    examples = {name: SKILLS[name].examples(test_examples, seed=1, split="test") for name in SKILL_NAMES}
    data = folder / f"{NEW_SKILL}.jsonl"
    folder.mkdir(parents=True)
    write_jsonl(data, SKILLS[NEW_SKILL].examples(train_examples, seed=0))
    options = training(data, folder / "adapter")
    base = _scores(*_base_model(options), examples)
    result = train(options).whole()
    tuned = _scores(result.model, result.tokenizer, examples)
    base_bytes = (base_path() / "model.safetensors").stat().st_size
    comparison = Comparison(result.output, result.card, examples, base, tuned, base_bytes)
    write_card(result.output, {**read_card(result.output), "scores": comparison.accuracies})
    return comparison


def training(data: Path, output: Path) -> TrainOptions:
    """How the embedded base is trained on the examples in `data`."""
    return TrainOptions(model=str(base_path()), data=[str(data)], output=str(output), **TRAINING)


def fresh_folder(parent: Path = Path("runs"), name: str = "quickstart") -> Path:
    """`runs/quickstart`, or the first of `runs/quickstart-2`, ... that is not there yet."""
    names = (parent / (name if number == 1 else f"{name}-{number}") for number in count(1))
    return next(path for path in names if not path.exists())


def _base_model(options: TrainOptions) -> tuple[Any, Any]:
    dtype, _ = choose_precision(options.precision)
    return load_model(options.model, dtype), load_tokenizer(options.model)


def _scores(model: Any, tokenizer: Any, examples: dict[str, list[Example]]) -> dict[str, Score]:
    return {name: exact_match(model, tokenizer, tests) for name, tests in examples.items()}


def write_jsonl(path: Path, examples: list[Example]) -> None:
    """One example a line."""
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
