"""The held-out loss, measured in batches: a mean over examples of the loss per response token.

    rows of about one length ─→ batch ─→ Σ of its examples' losses ─→ mean over all examples

An example's loss is its own, so the mean is the same however examples fall into batches and processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

WITHOUT_BACKWARD = 4  # × the rows of a training batch: no activations are kept
WEIGHT = "weight"  # of a batch, beside its tokens


def held_out_loader(rows: Dataset, collator: DataCollatorForLanguageModeling, batch_size: int) -> DataLoader[Any]:
    """Loads whole batches, each as the collator pads it and with its weight.

    Args:
        rows: With columns `input_ids` and `labels`, unpacked.
        collator: The one of the training, which may flatten packed rows; held-out rows are padded.
        batch_size: Of the training. A batch holds four times as many of the longest rows, and more of shorter ones.
    """
    lengths = list(map(len, rows["input_ids"]))
    batches = batches_by_length(lengths, WITHOUT_BACKWARD * batch_size * max(lengths))
    padded = replace(collator, padding_free=False)
    weight = torch.tensor(len(batches) / len(rows))  # the trainer takes the mean over batches

    def collate(batch: list[list[int]]) -> dict[str, Tensor]:
        return {**padded([rows[index] for index in batch[0]]), WEIGHT: weight}

    return DataLoader(batches, batch_size=1, collate_fn=collate)  # type: ignore[arg-type]


def batches_by_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices in batches of at most `tokens`, padding included; the longest rows come first.

    Example:
        >>> batches_by_length([2, 7, 3, 6], tokens=14)
        [[1, 3], [2, 0]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def summed_losses(
    log_probs: Tensor,  # [rows, tokens]: of each next token; 0 where it is not learned
    learned: Tensor,  # [rows, tokens], bool
) -> Tensor:  # []
    """The sum over rows of the mean loss of their learned tokens."""
    return -(log_probs.float().sum(1) / learned.sum(1).clamp(min=1)).sum()
