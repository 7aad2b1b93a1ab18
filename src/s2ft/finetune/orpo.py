"""ORPO, by the trainer that TRL has among its experiments: imported, which warns of that, only where it is asked for."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from s2ft.data.tokens import IGNORED
from s2ft.finetune.options import TrainOptions
from s2ft.finetune.trainer import RunTrainer
from s2ft.finetune.trainers import beta


class Orpo(RunTrainer, ORPOTrainer):
    """ORPO: the better answer is learned, and held against the worse one; nothing refers to the base."""

    config_class = ORPOConfig

    @staticmethod
    def settings(options: TrainOptions, max_length: int) -> dict[str, Any]:
        """Its beta; `max_length` has to be said, though rows are cut already."""
        return {**RunTrainer.settings(options, max_length), "max_length": max_length, **beta(options)}

    @staticmethod
    def lengths(dataset: Dataset) -> list[int]:
        """Two rows to a pair, as long as its longer answer."""
        answers = (dataset[f"{name}_input_ids"] for name in ("chosen", "rejected"))
        return [2 * max(map(len, pair)) for pair in zip(*answers, strict=True)]

    def __init__(self, *args: Any, train_dataset: Dataset, eval_dataset: Dataset | None = None, **kwargs: Any) -> None:
        held_out = None if eval_dataset is None else _rows(eval_dataset)
        super().__init__(*args, train_dataset=_rows(train_dataset), eval_dataset=held_out, **kwargs)

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """Rows are tokenised already."""
        return feature


def _rows(dataset: Dataset) -> Dataset:
    """Pairs as the trainer's collator reads them."""
    return Dataset.from_list([_row(pair) for pair in dataset])


def _row(pair: dict[str, list[int]]) -> dict[str, list[int]]:
    prompt = pair["prompt_ids"]
    row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for name in ("chosen", "rejected"):
        answer = pair[f"{name}_ids"]
        row[f"{name}_input_ids"] = prompt + answer
        row[f"{name}_attention_mask"] = [1] * len(prompt + answer)
        row[f"{name}_labels"] = [IGNORED] * len(prompt) + answer
    return row
