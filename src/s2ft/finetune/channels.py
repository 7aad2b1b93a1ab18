"""Which channels a run of S²FT trains: chosen on its own data."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from s2ft.finetune.options import AT_ONCE, TrainOptions
from s2ft.format.config import S2FTConfig
from s2ft.selection.scores import SCORES
from s2ft.selection.select import select
from s2ft.selection.weight_scores import Batch

log = logging.getLogger("s2ft")


def choose_channels(
    options: TrainOptions, digest: str, model: PreTrainedModel, dataset: Dataset, tokenizer: PreTrainedTokenizerBase
) -> S2FTConfig:
    """The resolved config for these options on tokenised examples whose source has this digest."""
    config = options.s2ft_config(seed=seed_from(digest))
    batches = _calibration(options, dataset, tokenizer) if SCORES[config.strategy].needs_data else None
    selection = select(model, config, batches)
    log.info("trained: %s", selection.trained)
    if selection.left_out:
        log.info("%s", selection.left_out)
    return selection.config


def seed_from(digest: str) -> int:
    """The selection's seed for a data set: the first 32 bits of its digest.

    Example:
        >>> seed_from("0000000a" + "f" * 56)
        10
    """
    return int(digest[:8], 16)


def _calibration(options: TrainOptions, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[Batch]:
    """Batches of the calibration's share of the examples, taken at even distances, as the trainer would collate them."""
    size = options.batch_size or AT_ONCE
    count = min(len(dataset), max(size, math.ceil(options.calibration * len(dataset))))
    rows = [index * len(dataset) // count for index in range(count)]
    collate = DataCollatorForLanguageModeling(pad_token_id=_pad_token_id(tokenizer))
    for start in range(0, count, size):
        yield collate([dataset[row] for row in rows[start : start + size]])


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(padding, int)  # tokenize() has made sure of an end-of-text token
    return padding
