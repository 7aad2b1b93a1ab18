"""Which channels a run of S²FT trains: chosen on its own data."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from s2ft.common.errors import S2FTError
from s2ft.finetune.objectives import OBJECTIVES
from s2ft.format.config import S2FTConfig
from s2ft.selection.scores import SCORES
from s2ft.selection.select import Selection, select
from s2ft.selection.weight_scores import Batch

if TYPE_CHECKING:
    from s2ft.finetune.options import TrainOptions

log = logging.getLogger("s2ft")


@dataclass(frozen=True)
class Examples:
    """The training data, for methods that look at it before they train."""

    tokens: Dataset  # columns input_ids and labels
    digest: str  # of what was tokenised
    tokenizer: PreTrainedTokenizerBase


def choose_channels(options: TrainOptions, model: PreTrainedModel, examples: Examples | None) -> S2FTConfig:
    """The resolved config for these options, on the training data; without it, for strategies that need none."""
    selection = _select(options, model, examples)
    log.info("trained: %s", selection.trained)
    if selection.left_out:
        log.info("%s", selection.left_out)
    return selection.config


def _select(options: TrainOptions, model: PreTrainedModel, examples: Examples | None) -> Selection:
    objective = OBJECTIVES[options.objective]
    config = options.s2ft_config(seed_of(examples), objective.task_type)
    needs_data = config.strategy is not None and SCORES[config.strategy].needs_data
    if needs_data and not objective.learnable:
        others = ", ".join(name for name, score in SCORES.items() if not score.needs_data)
        raise S2FTError(
            f"strategy={config.strategy!r} runs the model on answers to learn, and objective={options.objective!r} has none; "
            f"take {others}"
        )
    batches = _calibration(options, examples) if examples and needs_data else None
    return select(model, config, batches)


def seed_of(examples: Examples | None) -> int:
    """The seed that channels are drawn with where none is given; without data, 0."""
    return seed_from(examples.digest) if examples else 0


def seed_from(digest: str) -> int:
    """The selection's seed for a data set: the first 32 bits of its digest.

    Example:
        >>> seed_from("0000000a" + "f" * 56)
        10
    """
    return int(digest[:8], 16)


def _calibration(options: TrainOptions, examples: Examples) -> Iterator[Batch]:
    """Batches of the calibration's share of the examples, taken at even distances, as the trainer would collate them."""
    dataset, size = examples.tokens, options.batch_size
    assert size is not None  # settled by now
    count = min(len(dataset), max(size, math.ceil(options.calibration * len(dataset))))
    rows = [index * len(dataset) // count for index in range(count)]
    collate = DataCollatorForLanguageModeling(pad_token_id=_pad_token_id(examples.tokenizer))
    for start in range(0, count, size):
        yield collate([dataset[row] for row in rows[start : start + size]])


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(padding, int)  # tokenize() has made sure of an end-of-text token
    return padding
