"""Two adapters of the embedded base, to be served: each teaches it a skill that it lacks, as the quickstart does."""

from __future__ import annotations

from pathlib import Path

from peft.utils import CONFIG_NAME

from s2ft.demo.quickstart import training, write_jsonl
from s2ft.demo.skills import NEW_SKILLS, SKILLS
from s2ft.finetune.card import read_card
from s2ft.finetune.checkpoints import whole_checkpoints
from s2ft.finetune.resume import FINISHED
from s2ft.finetune.train import train

FOLDER = Path("runs/serve")
_LONGER = {"epochs": 4.0, "learning_rate": 4e-3}  # counting on is harder to learn than facts


def missing(folder: Path = FOLDER) -> list[str]:
    """The skills whose adapters are not there yet, or not trained to the end."""
    return [skill for skill in NEW_SKILLS if not _is_finished(folder / skill)]


def _is_finished(adapter: Path) -> bool:
    card = read_card(adapter) if (adapter / "run.json").is_file() else {"status": FINISHED}  # one that was put there
    return (adapter / CONFIG_NAME).is_file() and card.get("status") == FINISHED


def make(skill: str, folder: Path = FOLDER, examples: int = 3000) -> None:
    """Trains the adapter of a skill in `folder/SKILL`, or goes on with it; takes half a minute at most.

    Raises:
        KeyboardInterrupt: if it was interrupted; its checkpoint is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{skill}.jsonl"
    write_jsonl(data, SKILLS[skill].examples(examples, seed=0))
    other_channels = {"seed": NEW_SKILLS.index(skill)}  # two skills on the same channels would fuse badly
    again = {"resume": bool(whole_checkpoints(folder / skill))}
    train(training(data, folder / skill).model_copy(update={**_LONGER, **other_channels, **again})).whole()
