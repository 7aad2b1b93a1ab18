"""TRL's trainers for the objectives beside supervised fine-tuning, as runs of ours: what each reads, and how long its rows are.

Data comes tokenised (`data/preference_tokens.py`) by the rule of supervised fine-tuning, so TRL's own preparation is passed by.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from s2ft.finetune.options import TrainOptions
from s2ft.finetune.trainer import RunTrainer


class Dpo(RunTrainer, DPOTrainer):
    """DPO; the base, whose log-probabilities it compares with, is the model with its adapter disabled."""

    config_class = DPOConfig

    @staticmethod
    def settings(options: TrainOptions, max_length: int) -> dict[str, Any]:
        """Its beta."""
        return {**RunTrainer.settings(options, max_length), **beta(options)}

    @staticmethod
    def lengths(dataset: Dataset) -> list[int]:
        """Two rows to a pair, as long as its longer answer."""
        return pair_lengths(dataset)

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset


def beta(options: TrainOptions) -> dict[str, float]:
    """The option where it is given, else TRL's default."""
    return {} if options.beta is None else {"beta": options.beta}


def pair_lengths(dataset: Dataset) -> list[int]:
    """Tokens that each pair takes in a batch."""
    columns = (dataset[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return [
        2 * (len(prompt) + max(len(chosen), len(rejected))) for prompt, chosen, rejected in zip(*columns, strict=True)
    ]
