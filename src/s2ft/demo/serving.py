"""Two adapters of the embedded base, to be served: each teaches it a skill that it lacks, as the quickstart does."""

from __future__ import annotations

from pathlib import Path

from peft.utils import CONFIG_NAME

from s2ft.demo.quickstart import training, write_jsonl
from s2ft.demo.skills import NEW_SKILLS, SKILLS
from s2ft.finetune.train import train

FOLDER = Path("runs/serve")
_LONGER = {"epochs": 4.0, "learning_rate": 4e-3}  # counting on is harder to learn than facts


def missing(folder: Path = FOLDER) -> list[str]:
    """The skills whose adapters are not there yet."""
    return [skill for skill in NEW_SKILLS if not (folder / skill / CONFIG_NAME).is_file()]


def make(skill: str, folder: Path = FOLDER, examples: int = 3000) -> None:
    """Trains the adapter of a skill in `folder/SKILL`; takes half a minute at most."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{skill}.jsonl"
    write_jsonl(data, SKILLS[skill].examples(examples, seed=0))
    other_channels = {"seed": NEW_SKILLS.index(skill)}  # two skills on the same channels would fuse badly
    train(training(data, folder / skill).model_copy(update={**_LONGER, **other_channels}))
