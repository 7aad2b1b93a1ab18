"""One fine-tuning in memory: examples and a PEFT config in, the tuned model and its losses out.

Trainer, settings and labels are those of `s2ft train`; nothing is written. The base is the embedded one unless a model and its
tokenizer are given; its weights are fp32 for every method, so that none is favoured by the precision.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from s2ft.data.tokens import IGNORED, token_example
from s2ft.demo import base_path
from s2ft.demo.evaluate import exact_match
from s2ft.demo.skills import Example
from s2ft.finetune.arguments import longest, trainer_config, warmup_steps
from s2ft.finetune.options import TrainOptions, parse_options
from s2ft.finetune.trainer import Flow, Trainer
from s2ft.runtime.models import load_model, load_tokenizer

LAST = 0.1  # the share of the steps whose mean loss is the final one


@dataclass(frozen=True)
class Workload:
    """How much each run of a study trains and is tested on; the same for all methods. Kept runs call it their recipe."""

    steps: int = 60
    batch_size: int = 32
    train_examples: int = 1000
    test_examples: int = 100


@dataclass(frozen=True)
class Tuned:
    """A model after its run."""

    model: Any  # a PeftModel, or the base model itself
    losses: list[float]  # of each step
    trainable: int  # parameters

    @property
    def final_loss(self) -> float:
        """The mean over the last tenth of the steps: one batch is noise."""
        return fmean(self.losses[-max(1, round(LAST * len(self.losses))) :])


def fresh_base() -> PreTrainedModel:
    """The embedded base model, in fp32."""
    return load_model(str(base_path()), torch.float32)


@cache
def base_tokenizer() -> PreTrainedTokenizerBase:
    """The embedded base's tokenizer."""
    return load_tokenizer(str(base_path()))


def tokenizer_of(model: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model, tuned or not."""
    return _tokenizer(model.get_base_model().name_or_path if isinstance(model, PeftModel) else model.name_or_path)


_tokenizer = cache(load_tokenizer)


def tokens_of(examples: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase | None = None) -> Dataset:
    """Columns input_ids and labels, with labels on the completion only."""
    tokenizer = tokenizer or base_tokenizer()
    return Dataset.from_list([token_example(example, tokenizer) for example in examples])


def fine_tune(
    model: PreTrainedModel,
    tokens: Dataset,
    config: PeftConfig | None,
    workload: Workload,
    learning_rate: float,
    seed: int,
) -> Tuned:
    """Trains what `config` says, or every weight of `model` if it is None.

    Args:
        seed: Of the order of the examples, and of what a method draws without a seed of its own.
    """
    options = _options(workload, learning_rate, seed)
    trainer = _trainer(model, tokens, config, options)
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Tuned(trainer.accelerator.unwrap_model(trainer.model), losses, trainable)


def _options(workload: Workload, learning_rate: float, seed: int) -> TrainOptions:
    return parse_options(
        {
            "model": str(base_path()),
            "data": "generated",
            "output": tempfile.gettempdir(),  # the trainer requires a folder, but saves nothing there
            "max_steps": workload.steps,
            "batch_size": workload.batch_size,
            "gradient_accumulation": 1,
            "learning_rate": learning_rate,
            "train_seed": seed,
            "log_every": 1,
        }
    )


def _trainer(
    model: PreTrainedModel,
    tokens: Dataset,
    config: PeftConfig | None,
    options: TrainOptions,
) -> Trainer:
    args = trainer_config(
        options, max_length=longest(options, model), autocast=False, save_strategy="no", disable_tqdm=True
    )
    args.warmup_steps = warmup_steps(options, options.max_steps or 0)
    set_seed(options.train_seed)  # an adapter may start from random values
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=tokens,
        processing_class=tokenizer_of(model),
        peft_config=config,
        callbacks=[Flow()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def calibration(tokens: Dataset, rows: int, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """One batch of the first rows, collated as the trainer does."""
    collate = _collator(tokenizer or base_tokenizer())
    batch: dict[str, Any] = collate([tokens[row] for row in range(min(rows, len(tokens)))])
    return batch


@torch.no_grad()
def response_loss(model: Any, tokens: Dataset, batch_size: int) -> float:
    """The mean loss over all response tokens of the examples."""
    collate = _collator(tokenizer_of(model))
    model.eval()
    total = count = 0.0
    for start in range(0, len(tokens), batch_size):
        batch = collate([tokens[row] for row in range(start, min(start + batch_size, len(tokens)))])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        targets = float((batch["labels"][:, 1:] != IGNORED).sum())
        total, count = total + targets * float(model(**batch).loss), count + targets
    return total / count


def _collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForLanguageModeling:
    padding = tokenizer.pad_token_id
    assert isinstance(padding, int)
    return DataCollatorForLanguageModeling(pad_token_id=padding)


def accuracy(model: Any, examples: Sequence[Example]) -> float:
    """The share of exact matches, in [0, 1]."""
    return exact_match(model, base_tokenizer(), examples).accuracy
