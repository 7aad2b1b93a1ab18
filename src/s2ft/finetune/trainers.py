"""TRL's trainers for the objectives beside supervised fine-tuning, as runs of ours: what each reads, and how long its rows are.

Data comes tokenised (`data/preference_tokens.py`) by the rule of supervised fine-tuning, so TRL's own preparation is passed by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from s2ft.common.errors import S2FTError
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


class Kto(RunTrainer, KTOTrainer):
    """KTO; the divergence from the base is estimated on prompts with the answers to other prompts."""

    config_class = KTOConfig

    @staticmethod
    def settings(options: TrainOptions, max_length: int) -> dict[str, Any]:
        """Its beta."""
        return {**RunTrainer.settings(options, max_length), **beta(options)}

    @staticmethod
    def lengths(dataset: Dataset) -> list[int]:
        """A row to each prompt and its own answer."""
        return [len(prompt) + len(answer) for prompt, answer in _columns(dataset, "prompt_ids", "completion_ids")]

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: KTOConfig, *_: Any) -> Dataset:
        answers = dataset["completion_ids"][:]
        others = other_prompts(dataset["prompt_ids"][:], args.per_device_train_batch_size)
        return Dataset.from_dict({**dataset.to_dict(), "KL_completion_ids": [answers[other] for other in others]})


class Reward(RunTrainer, RewardTrainer):
    """A model that scores answers, read at their end."""

    config_class = RewardConfig

    @staticmethod
    def lengths(dataset: Dataset) -> list[int]:
        """Two rows to a pair, as long as its longer answer."""
        return [2 * max(map(len, pair)) for pair in _columns(dataset, "chosen_ids", "rejected_ids")]

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        prompts = dataset["prompt_ids"]
        answers = {name: dataset[name] for name in ("chosen_ids", "rejected_ids")}
        joined = {name: [a + b for a, b in zip(prompts, column, strict=True)] for name, column in answers.items()}
        return Dataset.from_dict(joined)


class Grpo(RunTrainer, GRPOTrainer):
    """GRPO: the model answers each prompt several times, and what rewards say of an answer is compared within its prompt's."""

    config_class = GRPOConfig
    counts_anew = False

    @staticmethod
    def settings(options: TrainOptions, max_length: int) -> dict[str, Any]:
        """How answers are sampled."""
        return {
            **beta(options),
            "num_generations": options.generations,
            "max_completion_length": options.completion_length,
            "temperature": options.temperature,
        }

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in TRL, which would go through too few prompts without a step, and resume later epochs in another order."""
        prompts, enough = len(self.train_dataset), self.args.generation_batch_size // self.num_generations
        if prompts < enough:
            raise S2FTError(
                f"a step samples answers to {enough} prompts, here are {prompts}; take fewer examples a step"
            )
        loader: DataLoader[Any] = super().get_train_dataloader()
        _draw_by_epoch(loader, self.args.seed)
        return loader


def _draw_by_epoch(loader: DataLoader[Any], seed: int) -> None:
    """Has the order of each epoch follow from the seed and its number, which accelerate tells the sampler."""
    batches: Any = loader.batch_sampler
    sampler = batches.sampler if hasattr(batches, "sampler") else batches.batch_sampler.sampler
    sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(seed + epoch)


def other_prompts(prompts: Sequence[Any], size: int) -> list[int]:
    """To each row the one before it in its batch of `size`, as in TRL; where that has the same prompt, the nearest before that.

    Example:
        >>> other_prompts(["a", "b", "c", "d"], size=2), other_prompts(["a", "a", "b", "b"], size=2)
        ([1, 0, 3, 2], [3, 3, 1, 1])
    """
    count = len(prompts)
    before = [row - 1 if row % size else min(row + size, count) - 1 for row in range(count)]
    nearest = [(row - 1) % count if prompts[row - 1] != prompts[row] else None for row in range(count)]
    for row in (*range(count), *range(count)):  # around twice: the first rows look at the last ones
        nearest[row] = nearest[row - 1] if nearest[row] is None else nearest[row]
    return [
        first if prompts[first] != prompts[row] or other is None else other
        for row, (first, other) in enumerate(zip(before, nearest, strict=True))
    ]


def beta(options: TrainOptions) -> dict[str, float]:
    """The option where it is given, else TRL's default."""
    return {} if options.beta is None else {"beta": options.beta}


def pair_lengths(dataset: Dataset) -> list[int]:
    """Tokens that each pair takes in a batch."""
    columns = _columns(dataset, "prompt_ids", "chosen_ids", "rejected_ids")
    return [2 * (len(prompt) + max(len(chosen), len(rejected))) for prompt, chosen, rejected in columns]


def _columns(dataset: Dataset, *names: str) -> Iterator[tuple[list[int], ...]]:
    return zip(*(dataset[name] for name in names), strict=True)
