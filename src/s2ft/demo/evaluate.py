"""Exact match: the share of examples whose greedy completion is the expected one, to the letter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from s2ft.demo.skills import Example
from s2ft.evaluate.engines import pad_left


@dataclass(frozen=True)
class Score:
    """How a model did on some examples."""

    accuracy: float  # in [0, 1]
    completions: list[str]  # in the order of the examples


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int = 128) -> Score:
    """Scores any causal language model (a PEFT model too) on examples of {"prompt", "completion"}."""
    was_training = model.training
    model.eval()
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(examples)), key=lambda n: len(examples[n]["prompt"]))
    completions = [""] * len(examples)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for n, completion in zip(batch, complete(model, tokenizer, [examples[n] for n in batch]), strict=True):
            completions[n] = completion
    model.train(was_training)
    right = sum(example["completion"] == got for example, got in zip(examples, completions, strict=True))
    return Score(right / max(1, len(examples)), completions)


def complete(model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[str]:
    """Greedy completions of one batch, one token longer than the longest expected one (the end of text)."""
    tokens, mask = pad_left([tokenizer(example["prompt"]).input_ids for example in examples], tokenizer.pad_token_id)
    expected = (tokenizer(example["completion"], add_special_tokens=False).input_ids for example in examples)
    output = model.generate(
        input_ids=tokens.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=1 + max(map(len, expected)),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # [examples, prompt + new]
    texts: list[str] = tokenizer.batch_decode(output[:, tokens.shape[1] :], skip_special_tokens=True)
    return texts
